"""Triplets as one batch: a row per member, or a packed row per triplet in which its members share the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tspin.data import MEMBERS
from tspin.prefix import PrefixLayout


@dataclass(frozen=True)
class TripletCollator:
    """Stacks triplets into one batch of right-padded rows, one row per member, and the index of every scored token.

    For B features and G members, with R = B * G rows of T tokens and N response tokens in all:
        input_ids, attention_mask: [R, T] int64; row b * G + m is prompt and member m of triplet b. `packed`: [1, T], one row
            `[x, y, y', y0]` per triplet, one after the other without padding; it needs `tspin.prefix.share_prompts`.
        prefix_layout: where the parts of a packed row lie; only with `packed`.
        rows: [N] int64 into the flattened [R * T] hidden states: the position before each response token.
        targets: [N] int64, the response tokens. sequence_ids: [N] int64, b * G + m. lengths: [B, G] int64.
        identical, truncated: [B] bool: rejected equals chosen; rejected was cut by length. False without rejected.
        ref_logps: [B, G] float32, nats, where the features have ref_<member>_logps.
        row: [B] int64, where the features have it.

    Raises:
        ValueError: a feature lacks a column, or its prompt or a member is empty.
    """

    pad_token_id: int
    members: tuple[str, ...] = MEMBERS
    packed: bool = False

    def __post_init__(self) -> None:
        if self.members not in (MEMBERS[:1], MEMBERS[:2], MEMBERS):
            raise ValueError(f"members: want the first one, two or three of {MEMBERS}, got {self.members}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        needed = ["prompt_ids", *(f"{member}_ids" for member in self.members)]
        for feature in features:
            absent = [column for column in needed if not feature.get(column)]
            if absent:
                raise ValueError(
                    f"features: want {needed}, none of them empty, got no {absent[0]} in {sorted(feature)}"
                )
        is_pair = "rejected" in self.members
        responses = [feature[f"{member}_ids"] for feature in features for member in self.members]
        lengths = torch.tensor([len(response) for response in responses])
        batch = {
            **(self._packed(features) if self.packed else self._padded(features)),
            "targets": torch.tensor([token for response in responses for token in response]),
            "sequence_ids": torch.arange(len(responses)).repeat_interleave(lengths),
            "lengths": lengths.view(len(features), -1),
            "identical": torch.tensor([f["chosen_ids"] == f["rejected_ids"] if is_pair else False for f in features]),
            "truncated": torch.tensor([is_pair and f.get("rejected_finish_reason") == "length" for f in features]),
        }
        if all("row" in feature for feature in features):
            batch["row"] = torch.tensor([feature["row"] for feature in features])
        references = [f"ref_{member}_logps" for member in self.members]
        if any(column in feature for feature in features for column in references):
            absent = [column for column in references if any(column not in feature for feature in features)]
            if absent:
                raise ValueError(f"features: want all of {references} in every row or none, got no {absent[0]} in some")
            values = [[feature[column] for column in references] for feature in features]
            batch["ref_logps"] = torch.tensor(values, dtype=torch.float32)
        return batch

    def _padded(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [(f["prompt_ids"], f[f"{member}_ids"]) for f in features for member in self.members]
        width = max(len(prompt) + len(response) for prompt, response in pairs)
        input_ids = torch.full((len(pairs), width), self.pad_token_id)
        attention_mask = torch.zeros((len(pairs), width), dtype=torch.int64)
        rows = []
        for r, (prompt, response) in enumerate(pairs):
            length = len(prompt) + len(response)
            input_ids[r, :length] = torch.tensor([*prompt, *response])
            attention_mask[r, :length] = 1
            rows.append(torch.arange(r * width + len(prompt) - 1, r * width + length - 1))
        return {"input_ids": input_ids, "attention_mask": attention_mask, "rows": torch.cat(rows)}

    def _packed(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        parts = [[f["prompt_ids"], *(f[f"{member}_ids"] for member in self.members)] for f in features]
        layout = PrefixLayout(tuple((len(prompt), tuple(map(len, members))) for prompt, *members in parts))
        input_ids = torch.tensor([token for group in parts for part in group for token in part])[None]
        # The first token of every response is predicted from the prompt's last.
        rows = [
            torch.cat([torch.tensor([prompt.stop - 1]), torch.arange(own.start, own.stop - 1)])
            for prompt, own in layout.responses()
        ]
        mask = torch.ones_like(input_ids)
        return {"input_ids": input_ids, "attention_mask": mask, "rows": torch.cat(rows), "prefix_layout": layout}
