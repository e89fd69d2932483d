"""The arithmetic of the network: fp32, tf32 or bf16."""

from .errors import UsageError

PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(precision, device, tf32=True):
    """Settle a precision: returns fp32, tf32 or bf16 and sets torch's matrix products to match.

    precision: None takes TF32 on a GPU (unless tf32 is False) and float32 on a CPU. Raises UsageError for tf32 without a
    GPU, and for a word that is none of PRECISIONS.
    """
    import torch  # the words above are there without it

    cuda = device.type == "cuda"
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"--precision {precision}: choose from {', '.join(PRECISIONS)}")
    if precision == "tf32" and not cuda:
        raise UsageError(f"--precision tf32: this device ({device}) has no TF32; use fp32 or bf16")
    precision = precision or ("tf32" if cuda and tf32 else "fp32")
    # With bf16 too: for what runs outside autocast, such as the autoencoder.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision
