"""Cross-request contamination: do one client's images change another client's answers? They must not.

Against defences that keep something from one request to the next, a few images do great harm (Wu et al., distribution
invading attack, ICML 2023; Cong et al., test-time poisoning, S&P 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mithridate.defenses.base import Defence, Prediction, Request
from mithridate.errors import MithridateError
from mithridate.types import Pixels, Scores, to_images


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """Victims' answers beside and after hostile images, against the same alone: ``changed`` victims have another class,
    scores moved by ``moved`` at most. What another batch size rounds differently is below 1e-4."""

    victims: int
    hostile: int
    changed: int
    moved: float

    @property
    def failed(self) -> bool:
        """Whether the attack failed, as it must."""
        return self.changed == 0 and self.moved <= 1e-4


def contaminate(defence: Defence, victims: Pixels, hostile: Sequence[Pixels], *, seed: int) -> Contamination:
    """Asks for ``victims`` uint8 ``[N, C, H, W]`` alone, in one run with each set of ``hostile`` images, and alone
    again after them, each time with the same randomness of their own."""
    quiet = _ask(defence, victims, None, seed)
    answers = [_ask(defence, victims, images, seed) for images in hostile]
    answers.append(_ask(defence, victims, None, seed))
    return Contamination(
        victims=len(victims),
        hostile=sum(len(images) for images in hostile),
        changed=int(torch.stack([found.argmax(1) != quiet.argmax(1) for found in answers]).any(0).sum()),
        moved=max(float((found - quiet).abs().max()) for found in answers),
    )


def _ask(defence: Defence, victims: Pixels, company: Pixels | None, seed: int) -> Scores:
    requests = [Request(images=to_images(victims), generator=torch.Generator().manual_seed(seed))]
    if company is not None:
        other = torch.Generator().manual_seed(seed + 1_000_000)
        requests.insert(0, Request(images=to_images(company), generator=other))
    answer = defence.predict_together(requests)[-1]
    if not isinstance(answer, Prediction):
        raise MithridateError(f"{defence.name} gave no answer: {answer}")
    return answer.scores
