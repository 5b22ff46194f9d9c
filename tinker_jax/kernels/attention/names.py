"""Names by which a rematerialisation policy knows values of attention."""

RESIDUALS = "attention_residuals"
"""What an implementation's forward pass saves for its backward pass, beside its inputs."""
