"""An inspection of adapters as one picture."""

from pathlib import Path
from typing import Any

from mot_lora.adapters.records import InspectRecord
from mot_lora.errors import UserError, writing


def save_picture(record: InspectRecord, path: str | Path) -> None:
    """Draw norms by layer, cosines and sign conflicts by layer, cosines in all, and what rank-r copies lose.

    The format is that of the file's name: .png, .svg or .pdf. Errors: UserError for another, or a path that cannot be
    written.
    """
    check_picture(path)
    from matplotlib.figure import Figure  # half a second to load, only where a picture is drawn

    figure: Any = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    names = [a.name for a in record.adapters]
    layers = list(record.layers)
    ticks = range(0, len(layers), max(1, len(layers) // 12))
    relative = record.overall.relative_norms is not None
    for i, name in enumerate(names):
        rows = record.layers.values()
        heights = [r.relative_norms[i] if r.relative_norms else r.norms[i] for r in rows]
        axes[0, 0].plot(heights, marker="o", ms=3, label=name)
    axes[0, 0].set_title("update by layer, |D|/|W|" if relative else "update by layer, |D|")
    axes[0, 0].legend(frameon=False)
    for i in range(len(names)):
        for j in range(i):
            cosines = [r.cosine[i][j] for r in record.layers.values()]
            axes[0, 1].plot(cosines, marker="o", ms=3, label=f"cosine {names[j]}, {names[i]}")
    conflicts = [r.sign_conflict for r in record.layers.values()]
    axes[0, 1].plot(conflicts, color="gray", ls="--", label="share of entries in conflict of sign")
    axes[0, 1].axhline(0, color="lightgray", lw=0.8, zorder=0)
    axes[0, 1].set_title("agreement by layer")
    if len(names) <= 5:
        axes[0, 1].legend(frameon=False, fontsize="small")
    for axis in axes[0]:
        axis.set_xticks(list(ticks), [_short(layers[t]) for t in ticks])
        axis.set_xlabel("layer")
    shown = axes[1, 0].imshow(record.overall.cosine, vmin=-1, vmax=1, cmap="RdBu_r")
    axes[1, 0].set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes[1, 0].set_yticks(range(len(names)), names)
    if len(names) <= 8:
        for i, row in enumerate(record.overall.cosine):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.6 else "black"
                axes[1, 0].text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    axes[1, 0].set_title("cosine of the updates")
    figure.colorbar(shown, ax=axes[1, 0])
    axes[1, 1].plot(list(record.lost), [100 * v for v in record.lost.values()], marker="o")
    axes[1, 1].set_xscale("log", base=2)
    axes[1, 1].set_xticks(list(record.lost), [str(r) for r in record.lost])
    axes[1, 1].set_ylim(bottom=0)
    axes[1, 1].set_xlabel("rank")
    axes[1, 1].set_title("share of the mean's norm that a rank-r copy loses, %")
    for axis in (axes[0, 0], axes[0, 1], axes[1, 1]):
        axis.spines[["top", "right"]].set_visible(False)
    with writing(path):
        figure.savefig(Path(path), dpi=150)


def check_picture(path: str | Path) -> None:
    """UserError for a picture that is none of .png, .svg and .pdf, or whose folder is not there."""
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: name a .png, .svg or .pdf file for the picture")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: its folder does not exist; make it first")


def _short(layer: str) -> str:
    last = layer.rpartition(".")[2]
    return last if last.isdigit() else last[:12]
