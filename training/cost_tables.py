"""The tables of docs/scaling.md, for the paper's setting: python -m training.costs prints them."""

from .costs import (
    IMAGENET,
    PEAKS,
    all_reduced_bytes,
    autoencoder_flops,
    cache_bytes,
    forward_flops,
    gathered_bytes,
    hours,
    on_paper,
    parameters,
    sharded_traffic,
    step_flops,
    training_bytes,
)

BATCH, GPUS, SHARE = 256, 8, 0.4
EACH = BATCH // GPUS
LINK = 25e9  # bytes a second from each GPU to another machine
RUNS = [(f"SiT-{size}/2", px, on_paper(f"SiT-{size}/2", px)) for px in (256, 512) for size in ("S", "B", "L", "XL")]
LARGER = [(f"SiT-{size}/2", 256, on_paper(f"SiT-{size}/2")) for size in ("3B", "8B", "17B")]  # than the paper's
GROUPS = ((8, 8), (16, 16), (32, 32), (32, 8))  # GPUs, and those that share one copy of the states


def group_name(group):
    gpus, shards = group
    return f"{gpus} GPUs" + (f", groups of {shards}" if shards < gpus else "")


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def markdown(title, header, rows):
    """A table with a title; numbers stand to the right in their columns."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def arithmetic_table():
    header = ["model", "px", "parameters, M", "forward, GFLOP/image", "step, TFLOP", "with checkpointing", "all-reduced, GB"]
    rows = []
    for name, px, network in RUNS:
        steps = [number(step_flops(network, BATCH, again) / 1e12) for again in (False, True)]
        sent = f"{all_reduced_bytes(network, GPUS) / 1e9:.2f}"
        rows.append([name, px, number(parameters(network) / 1e6), number(forward_flops(network) / 1e9), *steps, sent])
    return markdown(f"Arithmetic and traffic of a step, batch {BATCH} on {GPUS} GPUs", header, rows)


def memory_table():
    kinds = [(precision, again) for again in (False, True) for precision in ("tf32", "bf16")]
    header = ["model", "px", "states", *(precision + ", checkpointing" * again for precision, again in kinds)]
    rows = []
    for name, px, network in RUNS:
        sums = [sum(training_bytes(network, EACH, *kind)) for kind in kinds]
        states, _ = training_bytes(network, EACH)
        rows.append([name, px, *(number(count / 1e9) for count in (states, *sums))])
    return markdown(f"Memory of a GPU that trains on {EACH} images at a time, GB: states, and with activations", header, rows)


def time_table():
    kinds = [(gpu, precision) for gpu in PEAKS for precision in ("tf32", "bf16")]
    header = ["model", "px", *(" ".join(kind) for kind in kinds), "16 H100 bf16, ms/step", "all-reduce, ms"]
    rows = []
    for name, px, network in RUNS:
        spans = [[number(hours(network, steps, *kind, BATCH, GPUS, SHARE)) for steps in (400_000, 7_000_000)] for kind in kinds]
        step = hours(network, 1, "H100", "bf16", BATCH, 2 * GPUS, SHARE) * 3600 * 1000
        send = all_reduced_bytes(network, 2 * GPUS) / (GPUS * LINK) * 1000
        rows.append([name, px, *map(" / ".join, spans), number(step), number(send)])
    title = f"Hours for 400K / 7M steps on {GPUS} GPUs at {SHARE:.0%} of their peak; a step on {2 * GPUS}, and its all-reduce"
    return markdown(title, header, rows)


def autoencoder_table():
    header = ["", "latents, GB", "with mirror images, GB", "encode, GFLOP/image", "decode, GFLOP/image"]
    rows = []
    for px in (256, 512):
        sizes = [cache_bytes(IMAGENET, (4, px // 8, px // 8), variants) for variants in (1, 2)]
        rows.append([f"{px} px", *(number(count / 1e9) for count in (*sizes, *autoencoder_flops(px)))])
    return markdown(f"ImageNet's {IMAGENET:,} images as latents on disk, and the autoencoder's arithmetic", header, rows)


def sharding_table():
    header = ["model", "px", "parameters, M", f"DDP on {GPUS}", *map(group_name, GROUPS), "of that gathered"]
    rows = []
    for name, px, network in (RUNS[3], RUNS[7], *LARGER):
        gathered, cells = gathered_bytes(network, "bf16", GPUS), []
        for gpus, shards in ((GPUS, None), *GROUPS):
            states, activations = training_bytes(network, BATCH // gpus, "bf16", True, shards=shards)
            held = states + (gathered if shards else 0)
            cells.append(f"{number(held / 1e9)} + {number(activations / 1e9)}")
        rows.append([name, px, number(parameters(network) / 1e6), *cells, number(gathered / 1e9)])
    title = f"Memory of a GPU, GB: states and what is gathered + activations of batch {BATCH} in bf16 with checkpointing"
    return markdown(title, header, rows)


def traffic_table():
    header = ["model", "px", "", "DDP", *map(group_name, GROUPS[:3]), group_name(GROUPS[3]), "between its groups"]
    rows = []
    for name, px, network in (RUNS[3], *LARGER):
        for precision in ("fp32", "bf16"):
            sent = [sharded_traffic(network, *group, precision) for group in GROUPS]
            cells = [f"{number(gathered / 1e9)} + {number(reduced / 1e9)}" for gathered, reduced, _ in sent]
            ddp = number(all_reduced_bytes(network, GROUPS[-1][0]) / 1e9)
            rows.append([name, px, precision, ddp, *cells, number(sent[-1][-1] / 1e9)])
    return markdown("GB that a GPU sends in a step: gathered weights + reduced gradients", header, rows)


def span_table():
    header = ["model", "px", "H100", "arithmetic, s", "DDP, s", "all in one group, s", f"groups of {GPUS}, s"]
    rows = []
    for name, px, network in (RUNS[3], *LARGER):
        for gpus in (16, 32):
            step = hours(network, 1, "H100", "bf16", BATCH, gpus, SHARE, checkpointing=True) * 3600
            # Eight rings leave a machine by a link each; of groups that are a machine, each GPU is in a ring of its own.
            spans = [all_reduced_bytes(network, gpus) / GPUS, sum(sharded_traffic(network, gpus, gpus)) / GPUS]
            spans.append(sharded_traffic(network, gpus, GPUS)[2])
            rows.append([name, px, gpus, f"{step:.2f}", *(f"{sent / LINK:.2f}" for sent in spans)])
    title = f"Seconds of a step in bf16 with checkpointing, batch {BATCH}, and of what it sends between machines of {GPUS}"
    return markdown(title, header, rows)


TABLES = (arithmetic_table, memory_table, time_table, autoencoder_table, sharding_table, traffic_table, span_table)
