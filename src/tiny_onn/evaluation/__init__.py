"""The comparison of a student with its teacher on text that it was not trained on."""
