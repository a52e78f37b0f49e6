"""Training: the commands ``train`` and ``demo``, and what they are made of."""
