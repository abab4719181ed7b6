"""What is known of adapters: before they are merged, and of what was saved."""

from mot_lora.records import Record


class AdapterRecord(Record):
    """One adapter: its base, as it says, how many updates of which form it holds, their ranks, |D| and |D| / |W|."""

    name: str
    base: str | None
    parameters: int
    forms: dict[str, int]
    ranks: tuple[int, ...]
    norm: float
    relative_norm: float | None


class LayerRecord(Record):
    """Several adapters in one layer: each one's |D| and |D| / |W|, their cosines, and where their signs conflict."""

    norms: tuple[float, ...]
    relative_norms: tuple[float, ...] | None
    cosine: tuple[tuple[float, ...], ...]
    sign_conflict: float


class InspectRecord(Record):
    """What is known of adapters before they are merged; `lost` is the share of their mean that a rank-r copy loses."""

    adapters: tuple[AdapterRecord, ...]
    overall: LayerRecord
    layers: dict[str, LayerRecord]
    lost: dict[int, float]


class SaveRecord(Record):
    """What became of a merge as an adapter: its ranks, and the share |lost| / |D| that they cost, in all and by module.

    `method` is None for one adapter alone; `rank` is the largest of `ranks`. `uniform`: all modules are written with
    it, so that readers that know one rank and one alpha (vLLM, llama.cpp) scale them as PEFT does.
    """

    method: str | None
    rank: int
    ranks: dict[str, int]
    uniform: bool = True
    lost: float
    modules: dict[str, float]
