"""Make the token windows that a model is calibrated on."""
