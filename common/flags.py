"""The flags of a command as files record them."""


def flags_of(namespace):
    """{name: value} of the flags alone, without what the parser adds beside them."""
    return {key: value for key, value in vars(namespace).items() if key not in ("given", "identity")}
