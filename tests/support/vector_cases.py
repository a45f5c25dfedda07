"""Reads ``vectors/lovasz.npz``: inputs with the loss and gradient that every implementation here must give."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lovasz.spec import Loss, LovaszHinge, LovaszSoftmax, Result

PATH = Path(__file__).parents[1] / "vectors" / "lovasz.npz"
_KINDS: dict[str, type[LovaszSoftmax | LovaszHinge]] = {"lovasz_softmax": LovaszSoftmax, "lovasz_hinge": LovaszHinge}


@dataclass(frozen=True)
class Case:
    """One vector.

    Attributes:
        logits: float32.
        labels: uint8.
        loss: from a float64 evaluation of the textbook route at these very logits.
        grad: float64, in the shape of the logits.
    """

    name: str
    loss_spec: Loss
    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    loss: float
    grad: npt.NDArray[np.float64]

    def check(self, answer: Result[Any]) -> None:
        """Checks the answer to its input, computed in float32."""
        assert math.isclose(answer.loss, self.loss, rel_tol=1e-6, abs_tol=1e-12)
        assert np.linalg.norm(np.asarray(answer.grad, np.float64) - self.grad) <= 1e-5 * np.linalg.norm(self.grad)


def load() -> list[Case]:
    """All vectors, in the order of the file."""
    with np.load(PATH) as arrays:
        described: list[dict[str, Any]] = json.loads(str(arrays["cases"]))
        return [
            Case(
                name=case["name"],
                loss_spec=_KINDS[case["kind"]](**case["options"]),
                logits=arrays[f"{i}_logits"],
                labels=arrays[f"{i}_labels"],
                loss=case["loss"],
                grad=arrays[f"{i}_grad"],
            )
            for i, case in enumerate(described)
        ]
