"""`AnyOrderAR`: the model of any-order AR."""

from .set_dlm import SetDLM


class AnyOrderAR(SetDLM):
    """An any-order AR model on one device: Set Diffusion with uniform times by default."""

    objective = "any_order_ar"
