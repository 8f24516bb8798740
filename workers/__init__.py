"""How good a candidate is: models, calibration and measuring."""
