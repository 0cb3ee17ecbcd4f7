"""A student measured against its teacher on text that it was not trained on."""
