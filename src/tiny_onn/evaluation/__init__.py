"""The measurement of a student against its teacher on text that it was not trained on."""
