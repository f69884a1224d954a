"""Quest over the prompt, RaaS over the answer: the RaaS paper's advice for long prompts."""

from __future__ import annotations

import dataclasses

from raas_jax.policies.base import Bounded, Metadata, Selection
from raas_jax.policies.budgeted import check_budget
from raas_jax.policies.quest import top_pages
from raas_jax.policies.raas import RaaS


@dataclasses.dataclass(frozen=True)
class RaaSQuest(RaaS):
    """Keeps a prompt whole but reads only its top pages; generated pages are those of `RaaS`.

    Memory is O(prompt + budget), time O(prompt_budget + budget) but for the bounds of the prompt's
    pages (arXiv 2502.11147, section on limitations, and 2406.10774). Options are those of `RaaS`,
    with the prompt excluded from the budget.

    Attributes:
      prompt_budget: prompt tokens read per token, layer and key/value head; a multiple of
        `page_size`, at least two pages.
    """

    prompts = ("excluded",)

    prompt_budget: int = dataclasses.field(default=1024, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_budget(self.prompt_budget, self.page_size)
        except ValueError as error:
            raise ValueError(f"prompt_{error}") from None

    @property
    def needs_prompt_bounds(self) -> bool:
        return True

    @property
    def selects(self) -> bool:
        return True

    def select(self, meta: Metadata, bounded: Bounded) -> Selection:
        assert bounded.prompt is not None
        pages = self.prompt_budget // self.page_size
        return Selection(prompt=top_pages(bounded.prompt, pages, self.granularity))
