"""What a layer adds to the residual stream besides its token mixer and MLP."""
