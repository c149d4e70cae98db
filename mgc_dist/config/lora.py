"""Low-rank adapters as `--lora` describes them: r=16,alpha=32,targets=q_proj,v_proj."""

import re
from dataclasses import dataclass

from mgc_dist.config.knobs import Range, require

_FORM = re.compile(
    r"r=([0-9]{1,9})(?:,alpha=([0-9]{1,9}(?:\.[0-9]{1,9})?))?(?:,targets=([\w.]+(?:,[\w.]+)*))?"
)
_RANK = Range(minimum=1, maximum=4096, cure="8 to 64 is usual")
_ALPHA = Range(above=0, maximum=65_536, cure="twice r is usual, and what is taken without it")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of a model's linear layers.

    Attributes:
        r: rank.
        alpha: the adapter's product is multiplied by alpha / r.
        targets: ends of the layers' names; none means those that are usual for the model.
    """

    r: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def parsed(cls, text: str) -> "Lora":
        """From the text of the flag.

        Raises:
            UserError: it has another form, or a value is out of range.
        """
        form = "r=N[,alpha=A][,targets=NAME,NAME]"
        found = _FORM.fullmatch(text)
        example = "for example --lora r=16,alpha=32,targets=q_proj,v_proj; or --lora r=16"
        require("--lora", found is not None, text, form, example)
        assert found is not None
        r = int(found[1])
        alpha = 2.0 * r if found[2] is None else float(found[2])
        for name, value, allowed in (("r", r, _RANK), ("alpha", alpha, _ALPHA)):
            require(f"--lora: {name}", allowed.holds(value), value, str(allowed), allowed.cure)
        return cls(r=r, alpha=alpha, targets=tuple(found[3].split(",")) if found[3] else ())
