"""Token mixers besides attention: recurrences and convolutions, each chosen per layer by Config."""
