"""Run the notebook and keep its outputs: python scripts/run_notebook.py [run_SiT.ipynb]

In place, in this repository's root, on the checkpoint that it names. Written are outputs and nothing of when, where or how they
were made; an error, a warning or a file that is too large is refused, and leaves the notebook as it was.
"""

import base64
import io
import json
import os
import re
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "run_SiT.ipynb"
LIMIT = 400_000  # bytes
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
REPOSITORY = re.compile(r'^REPOSITORY = "([^"]+)"', flags=re.M)
BADGE = re.compile(r"(https://colab\.research\.google\.com/github/)[^/]+/[^/]+(/)")
KEPT = ("text/plain", "image/png")  # of each output; Pillow offers every picture as a JPEG too


def execute(notebook):
    """Run all cells of a notebook, a NotebookNode, in one kernel. Raises nbclient's CellExecutionError where one fails."""
    from nbclient import NotebookClient
    from traitlets.config import Config

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = dict(timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(ROOT)}})
    sockets = Config({"KernelManager": {"transport": "ipc"}})  # files, not ports that others on the machine could read
    NotebookClient(notebook, config=sockets, **settings).execute()


def smaller(png):
    """A PNG in base64 with no more than 256 colours, which is half of it or less."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    file = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def tidy(notebook):
    """A run notebook as it is kept: outputs without what differs from run to run, and the badge's link to REPOSITORY."""
    notebook["metadata"] = METADATA
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "markdown":
            cell["source"] = BADGE.sub(rf"\g<1>{REPOSITORY.search(code)[1]}\2", "".join(cell["source"]))
        for output in cell.get("outputs", ()):
            if "data" in output:
                output["data"] = {kind: output["data"][kind] for kind in KEPT if kind in output["data"]}
                output["metadata"] = {}
                if "image/png" in output["data"]:
                    output["data"]["image/png"] = smaller(output["data"]["image/png"])
    return notebook


def complaints(notebook):
    """What of a notebook's outputs must not be kept, in words."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"{output['output_type']}: {''.join(output.get('text', output.get('evalue', '')))}"
    if (size := len(json.dumps(notebook))) > LIMIT:
        yield f"{size} bytes are above {LIMIT}"


def main(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    execute(notebook)
    tidy(notebook)
    nbformat.validate(notebook)
    if found := list(complaints(notebook)):
        sys.exit("\n".join(found))
    nbformat.write(notebook, path)
    print(f"{path}: {Path(path).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:] or [NOTEBOOK])
