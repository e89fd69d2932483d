"""Fine-tuning: a new network that starts from the weights of another, with other classes, another size or other channels."""

from common.checkpoint import weights_of
from common.dialects import open_checkpoint
from common.errors import UserError, told_as
from common.recipe import recipe_of
from inference.loading import note_on_classes

from .tensors import load_shards, whole

CLASSES, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"
INPUT, OUTPUT = "x_embedder.proj.weight", ("final_layer.linear.weight", "final_layer.linear.bias")


def open_init(path, kind, recipe):
    """The content of a file to begin a run of recipe with. Raises UserError where its network is another."""
    with told_as("--init"):
        content = open_checkpoint(path, kind, num_heads=recipe.model_args["num_heads"])
        theirs = _recipe(content, recipe, path)
        for what in ("depth", "hidden_size", "num_heads", "mlp_ratio"):
            if theirs.model_args[what] != recipe.model_args[what]:
                found, wanted = theirs.model_args[what], recipe.model_args[what]
                raise UserError(f"--ckpt {path}: its {what} is {found}, that of --model {recipe.model} is {wanted}")
    return content


def _recipe(content, recipe, path):
    return recipe_of(content, weights_of(content, path), path, num_heads=recipe.model_args["num_heads"])


def take_over(model, recipe, content, path, log):
    """Load into a fresh model of recipe what fits of open_init's content: the EMA's weights where it has them. log is told
    of each tensor that keeps its fresh values, and why.

    Rows of classes go by their names where both know them, else by their numbers where these are as many; the null class's
    row is kept. Positions are not learnt, and made for the size. Of a head with sigma the half that is used is taken.
    """
    state, theirs = weights_of(content, path), _recipe(content, recipe, path)
    fresh, taken = model.state_dict(), dict(state)
    fresh |= {name: whole(fresh[name]) for name in (CLASSES, POSITIONS, INPUT, *OUTPUT)}
    if theirs.model_args["learn_sigma"]:
        taken |= {name: _used_half(state[name], theirs.model_args["in_channels"]) for name in OUTPUT}
    taken[CLASSES], rows = _class_rows(fresh[CLASSES], state[CLASSES], recipe, theirs)
    taken[POSITIONS] = fresh[POSITIONS]
    reasons, both = {}, (theirs.model_args, recipe.model_args)
    ends = ("patch_size", "in_channels")  # which the layout of the ends follows, whatever their shapes
    if any(theirs.model_args[what] != recipe.model_args[what] for what in ends):
        of = "of " + ", here of ".join(f"{each['in_channels']} channels, patches of {each['patch_size']}" for each in both)
        taken |= {name: fresh[name] for name in (INPUT, *OUTPUT)}
        reasons |= dict.fromkeys((INPUT, *OUTPUT), of)
    if state[POSITIONS].shape != fresh[POSITIONS].shape:
        reasons[POSITIONS] = f"made for a grid of {model.grid[0]} x {model.grid[1]} patches"
    if rows:
        reasons[CLASSES] = rows
    load_shards(model, taken, path)
    log(f"Starting from the weights of {path}: {len(taken) - len(reasons)} of {len(taken)} tensors taken over")
    if recipe.num_classes == len(state[CLASSES]) and (note := note_on_classes(content, {}, theirs, path)):
        log(f"  {note.split('; if not')[0]}")
    for name, reason in reasons.items():
        log(f"  not taken over: {name}, {reason}")
    ours, other = recipe.transport, theirs.transport
    if other is not None and (other.path_type, other.prediction) != (ours.path_type, ours.prediction):
        means = f"{other.prediction} on the path {other.path_type}"
        log(f"  it was trained for {means}, this run is for {ours.prediction} on {ours.path_type}: that is to be learnt anew")
    if theirs.time_map != recipe.time_map:
        told = theirs.time_map or "t", recipe.time_map or "t"
        log(f"  it was told times as {told[0]}, this run tells {told[1]}: that is to be learnt anew")


def _used_half(tensor, channels):
    """The rows of the head's Linear, (patch^2, 2 channels, ...) as one, of which the second half of channels is sigma's."""
    return tensor.unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1)


def _class_rows(fresh, table, ours, theirs):
    """(the table of classes, or what is new in it, in words, or None): see take_over."""
    count, before = ours.num_classes, theirs.num_classes
    table, known = table.to(fresh.dtype), dict(zip(theirs.classes, range(before)))
    if ours.classes and known:
        kept = {new: known[name] for new, name in enumerate(ours.classes) if name in known}
    else:
        kept = {i: i for i in range(count)} if count == before else {}
    rows = fresh.clone()
    for new, old in kept.items():
        rows[new] = table[old]
    if ours.null_class is not None and theirs.null_class is not None:
        rows[ours.null_class] = table[theirs.null_class]
    null_lost = ours.null_class is not None and theirs.null_class is None
    if len(kept) == count:
        return rows, "its rows are kept but the null class's, which it has not" if null_lost else None
    what = "by name" if ours.classes and known else f"it knows {before} classes"
    null = "the null class's is kept" if ours.null_class is not None and theirs.null_class is not None else "none is kept"
    return (
        rows,
        f"{count - len(kept)} of {count} classes' rows are new ({what}); {null if not kept else f'{len(kept)} are kept'}",
    )
