"""Haechi as a guardrail of any-guardrail: `HaechiGuardrail().validate(text)` gives a `GuardrailOutput`."""

from typing import Any

from any_guardrail import (
    CategoryResult,
    GuardrailInferenceOutput,
    GuardrailOutput,
    GuardrailPreprocessOutput,
    ThreeStageGuardrail,
)

import haechi


class HaechiGuardrail(ThreeStageGuardrail[list[str], list[haechi.Verdict]]):
    """Harmful queries, English and Korean; a list is judged as one batch."""

    def __init__(self, model_id: str | None = None, point: str = "balanced") -> None:
        """Load a model folder, the embedded model without one, at an operating point."""
        self.guard = haechi.load(model_id, point=point)
        self.model_id = self.guard.name

    def _pre_processing(self, input_text: str) -> GuardrailPreprocessOutput[list[str]]:
        return GuardrailPreprocessOutput(data=[input_text])

    def _inference(
        self, model_inputs: GuardrailPreprocessOutput[list[str]]
    ) -> GuardrailInferenceOutput[list[haechi.Verdict]]:
        return GuardrailInferenceOutput(data=self.guard.check(model_inputs.data))

    def _post_processing(self, model_outputs: GuardrailInferenceOutput[list[haechi.Verdict]]) -> GuardrailOutput:
        return _output(model_outputs.data[0])

    def _validate_batch(self, input_texts: list[str], **kwargs: Any) -> list[GuardrailOutput]:
        return [_output(verdict) for verdict in self.guard.check(input_texts)]


def _output(verdict: haechi.Verdict) -> GuardrailOutput:
    risk = verdict.score or 0.0
    return GuardrailOutput(
        valid=verdict.unsafe is False,  # what could not be judged does not pass
        score=verdict.score,
        categories=[
            CategoryResult(name=code, triggered=code == verdict.category, score=risk * share)
            for code, share in verdict.categories.items()
        ],
        extra={"error": verdict.error} if verdict.error else None,
        raw=verdict.model_dump(),
    )


if __name__ == "__main__":
    guardrail = HaechiGuardrail()
    queries = ["how do I whittle a spoon", "헤어진 여자친구 카톡 몰래 훔쳐보는 법", ""]
    for query, output in zip(queries, guardrail.validate(queries), strict=True):
        caught = [category.name for category in output.categories if category.triggered]
        print(output.valid, output.score, caught, output.extra, repr(query))
    print(guardrail.validate("how do I pick my neighbour's lock").model_dump_json(exclude={"categories", "raw"}))
