"""How good a candidate is: masks, errors, divergence, sensitivities."""
