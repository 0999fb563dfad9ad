"""Execute the percent scripts of analysis/ and write each as a notebook with its tables and pictures beside it.

    python experiments/notebooks.py            # all of them: make notebooks
    python experiments/notebooks.py gates      # one

The script is the source, the notebook a copy of it for readers on a forge. The same script with the same versions of
the packages gives the same notebook to the byte: no path, no time and no warning of this machine is kept.
"""

import argparse
import base64
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from PIL import Image

ANALYSIS = Path(__file__).resolve().parent.parent / "analysis"
NAMES = sorted(script.stem for script in ANALYSIS.glob("*.py"))
_SECONDS = 120  # a cell takes up to three; of a machine that is busy
_SET_BY_A_READER = ("PYRO_BLORA_RUN", "PYRO_BLORA_RUNS", "PYTHONWARNINGS", "IPYTHONDIR")
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"},
}


class _Kernel(AsyncKernelManager):
    """A kernel of the running interpreter, whatever kernels are installed for its user."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        return KernelSpec(argv=command, language="python")


def smaller(png: bytes) -> bytes:
    """The picture with 256 colours, without alpha and without the name of the program that drew it."""
    picture, buffer = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def executed(name: str, **variables: str) -> nbformat.NotebookNode:
    """A script of analysis/ as an executed notebook: run in its folder from top to bottom, with this checkout.

    variables: environment variables of the script, such as PYRO_BLORA_RUN; this process's own do not count.
    Errors: nbclient.exceptions.CellExecutionError; RuntimeError for a cell that warns or writes to stderr.
    """
    notebook = jupytext.read(ANALYSIS / f"{name}.py")
    for cell in notebook.cells:  # jupytext's are random
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
    environment = {key: value for key, value in os.environ.items() if key not in _SET_BY_A_READER}
    with tempfile.TemporaryDirectory() as profile:
        environment |= {"PYTHONPATH": str(ANALYSIS.parent), "IPYTHONDIR": profile, **variables}
        client = nbclient.NotebookClient(
            notebook, kernel_manager_class=_Kernel, timeout=_SECONDS, record_timing=False, coalesce_streams=True
        )
        client.execute(env=environment, cwd=str(ANALYSIS))
    notebook.metadata = nbformat.from_dict(_METADATA)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output.get("name") == "stderr":
            raise RuntimeError(f"{name}.py writes to stderr: {output.text.strip()}")
        if "image/png" in output.get("data", {}):
            png = smaller(base64.b64decode(output.data["image/png"]))
            output.data["image/png"] = base64.b64encode(png).decode()
    nbformat.validate(notebook)
    return notebook


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    names = parser.parse_args(arguments).names or NAMES
    if unknown := sorted({*names} - {*NAMES}):
        parser.error(f"there is no notebook {', '.join(unknown)}: they are {', '.join(NAMES)}")
    for name in names:
        path = ANALYSIS / f"{name}.ipynb"
        nbformat.write(executed(name), path)
        print(f"{path.relative_to(ANALYSIS.parent)}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
