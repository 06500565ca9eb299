"""STUDY.md, from the rows: verdicts first, then tables, and what is still missing. What was measured comes from a row."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study import plan
from benchmarks.study.claims import (
    CLAIMS,
    FEWEST,
    FRESH,
    HALF,
    MARGIN,
    SAMPLED,
    Study,
    Verdict,
    at,
    claim_a,
    claim_b,
    last,
    shown,
    side,
)
from benchmarks.study.plan import MENDING, METHODS, QUESTIONS, SEEDS, Rows, tuning_scores
from tspin.comparison import Estimate

LABELS = {
    "tspin": "T-SPIN",
    "spin": "SPIN",
    "sft": "SFT",
    "tspin_no_history": "T-SPIN without history",
    "tspin_ref": "T-SPIN with a reference",
}
_WORDS = ("does not hold", "is not settled", "holds", "is pending")
_METHOD = f"""\
The sloppy pupil of `tspin demo` (286k parameters; three-digit sums in columns; 85 % of the solutions it is taught never carry) is
fine-tuned by the loop of `tspin run` on {plan.TRAIN_ROWS} clean solutions, {plan.ITERATIONS} iterations of two epochs.
Problems, pupil and samples are made anew for each seed. Rates are tuned for each method by greedy exact match of the last policy
on {plan.EVAL_ROWS} validation problems, {len(plan.TUNING_SEEDS)} seeds, on a half-decade grid that grows until the best rate
has both neighbours. All else is measured on {plan.EVAL_ROWS} test problems with {len(SEEDS)} other
seeds. No two splits share a problem. A second toy, of words and numbers: [word problems](WORD_PROBLEMS.md).

Brackets are 95 % intervals (Student's t over seeds). Differences are taken seed by seed between runs from one pupil, bit for bit:
two machines train a seed's pupil to other digits, so what a later arm is compared with was run again from that arm's pupil.
A claim *holds* where every interval that it needs lies on its side of the bound, *does not hold* where one lies on the other
side, and *is not settled* between. (a) needs every change of T-SPIN from one iteration to the next above 0, and SPIN's from the
best iteration before the last to the last below 0, greedy; (b) more than {HALF} of SPIN's pairs misaligned over the last eight
optimizer steps of iterations 1 and 2, and more fresh pairs in the wrong order than under T-SPIN; (c) T-SPIN on a quarter of the
data, with as many steps, less SFT on all of it above -{MARGIN}; (d) a higher mean over iterations with history than without, and
a smaller largest drop (where a policy never drops, its smallest rise counts below 0).

The bounds were written before the first confirming arm was run. Since then, on seeing the rows: fresh pairs leave out y' = y and
differences pair by pupil, neither of which changed a verdict; and a mean on the wrong side is no longer enough for *does not
hold*, the interval must lie there, which made (d) *not settled* where it was *does not hold*."""
_TUNING = f"""\
A share of {plan.EVAL_ROWS} problems has a standard error of at most {0.5 / plan.EVAL_ROWS**0.5:.3f}, and the two seeds differ by
more: neighbouring rates are often not told apart. The rule takes the best mean all the same."""
_CONTROLS = f"""\
The last policy: mean and standard deviation over seeds, and the difference from the first arm of each block. A difference is
between runs from one pupil, so where an arm was run again it is not that of the means beside it. No interval is corrected for the
number of them, of which about one in twenty leaves out 0 by chance, and none covers the choice of a rate on two seeds. A share of
fresh pairs needs {FEWEST} of them in every seed, y' = y left out."""
_COMMANDS = """\
    python -m benchmarks.study run --directory DIR --jobs 2    # goes on with the arms that have no row in rows.jsonl
    python -m benchmarks.study write                           # this page and its figures, from the rows"""
_LIMITS = """\
Answers here are short, clean and deterministic, so SFT's target is the best policy there is. The model is four orders of magnitude
smaller than the paper's. Held-out problems come from the distribution of the training problems: nothing is said of transfer from
one task to another, which the paper's benchmarks measure. One optimizer, one batch size, one temperature. What may carry over is
the mechanism (which log-probs move, and what keeps a loss from going flat), not the size of a gain."""


def page(rows: Rows, figures: Sequence[str] = ()) -> str:
    """The text of STUDY.md."""
    study = Study.of(rows)
    verdicts = {claim: decide(study) for claim, decide in CLAIMS.items()}
    at_one_rate = [decide(study, "tspin at 1e-5", "spin at 1e-5") for decide in (claim_a, claim_b)]
    firsts = sorted(verdicts.items(), key=lambda item: _WORDS.index(item[1].word))
    pictures = {name: f"![{name.removesuffix('.png')}]({name})" for name in figures}
    parts = [
        "\n".join(f"- **{verdict.word[0].upper()}{verdict.word[1:]}: {claim}.**" for claim, verdict in firsts),
        "# Does a toy show what the paper claims?",
        _METHOD,
        "## Verdicts at tuned rates",
        *(_paragraph(claim, verdict) for claim, verdict in verdicts.items()),
        "## The same at one shared rate of 1e-5",
        *(_paragraph(f"({letter})", verdict) for letter, verdict in zip("ab", at_one_rate)),
        "## The methods at their tuned rates",
        _methods_table(study),
        pictures.get("scores.png", ""),
        pictures.get("mechanism.png", ""),
        "## Controls",
        _CONTROLS,
        _controls_table(study),
        _robust(study),
        _ten(study),
        _fine_tuned(study),
        pictures.get("controls.png", ""),
        "## Tuning",
        _TUNING,
        _tuning_table(rows, study.rates),
        pictures.get("rates.png", ""),
        "## What has been run",
        _account(rows),
        _COMMANDS,
        "## What this cannot show",
        _LIMITS,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _paragraph(claim: str, verdict: Verdict) -> str:
    so_far = f"So far, not yet with {len(SEEDS)} seeds: " if verdict.is_begun else ""
    return f"**{claim}: {verdict.word}.** {so_far}{verdict.why}"


def spread(estimate: Estimate | None) -> str:
    """Mean and standard deviation over seeds."""
    if estimate is None:
        return "-"
    return f"{estimate.mean:.3f}" + ("" if estimate.sd is None else f" ± {estimate.sd:.3f}")


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headers, ["---"] * len(headers), *lines))


def _methods_table(study: Study) -> str:
    steps = range(-1, plan.ITERATIONS)
    names = [name for name in METHODS if study.arms.get(name)]
    if not names:
        return "Pending."
    lines = []
    for key, title in ((plan.SCORE, "greedy"), (SAMPLED, "sampled")):
        for name in names:
            cells = [spread(study.estimate(name, at(t, key))) for t in steps]
            less = "" if name == "tspin" else shown(study.difference(name, "tspin", last(key)), True)
            rate = f"{study.rates[name]:.0e}".replace("e-0", "e-")
            lines.append([f"{LABELS[name]}, {title}", rate, str(len(study.arms[name])), *cells, less])
    headers = ["exact match", "rate", "seeds", *("pi_0" if t < 0 else str(t) for t in steps), "last, less T-SPIN"]
    return table(headers, lines)


def _controls_table(study: Study) -> str:
    lines = []
    for question, base, names in QUESTIONS:
        if not any(study.arms.get(name) for name in (base, *names)):
            lines.append([f"**{question}**", "pending", "", "", "", "", ""])
            continue
        lines.append([f"**{question}**", "", "", "", "", "", ""])
        for name in (base, *names):
            seeds = len(study.arms.get(name, {}))
            greedy, sampled = (spread(study.estimate(name, last(key))) for key in (plan.SCORE, SAMPLED))
            fresh = study.estimate(name, last(FRESH))
            fresh = spread(fresh if fresh is not None and fresh.n == seeds else None)
            differences = [shown(study.difference(name, base, last(key)), True) for key in (plan.SCORE, SAMPLED)]
            cells = [greedy, sampled, fresh, *(["", ""] if name == base else differences)]
            lines.append([name, str(seeds), *cells])
    return table(
        ["arm", "seeds", "greedy", "sampled", "fresh y<y'", "greedy, difference", "sampled, difference"], lines
    )


def _robust(study: Study) -> str:
    """What alpha and beta do over the range in which the paper calls both robust."""
    found = []
    for name in ("tspin, alpha 0.1", "tspin, alpha 0.3", "tspin, beta 0.3", "tspin, beta 1"):
        if not study.arms.get(name):
            return ""
        greedy, sampled = (side(study.difference(name, "tspin", last(key))) for key in (plan.SCORE, SAMPLED))
        found.append(f"{name.removeprefix('tspin, ')} is {greedy} greedy and {sampled} sampled")
    here = "; ".join(found)
    return (
        f"The paper finds T-SPIN robust to alpha and beta between 0.1 and 1. Here, beside alpha 1 and beta 0.1: {here}."
    )


def _ten(study: Study) -> str:
    """What five iterations more change."""
    changed = lambda key: lambda row: last(key)(row) - at(plan.ITERATIONS - 1, key)(row)
    parts = [
        f"{LABELS[method]} by {shown(study.estimate(f'{method}, 10 iterations', changed(plan.SCORE)), True)} greedy and "
        f"{shown(study.estimate(f'{method}, 10 iterations', changed(SAMPLED)), True)} sampled"
        for method in ("tspin", "spin", "tspin_no_history")
        if study.arms.get(f"{method}, 10 iterations")
    ]
    return f"From iteration {plan.ITERATIONS - 1} to 9, {'; '.join(parts)}." if parts else ""


def _fine_tuned(study: Study) -> str:
    """What becomes of a pi_0 that was fine-tuned on the same prompts before, in words; empty before there are arms."""
    if not any(study.arms.get(name) for name in MENDING):
        return ""
    change = lambda key: lambda row: last(key)(row) - at(-1, key)(row)
    parts = []
    for name in MENDING:
        greedy, sampled = (shown(study.estimate(name, change(key)), True) for key in (plan.SCORE, SAMPLED))
        parts.append(f"{name.removeprefix('fine-tuned, ')} by {greedy} greedy and {sampled} sampled")
    text = f"From a pi_0 that SFT had already fine-tuned on the same prompts, the last policy differs from it: {'; '.join(parts)}."
    verdicts = [f"{what} {_mends(study.estimate(name, change(plan.SCORE)))}" for name, what in _MENDED.items()]
    helped = "; ".join(
        f"{what} by {shown(study.difference(name, 'fine-tuned, tspin'), True)} greedy and "
        f"{shown(study.difference(name, 'fine-tuned, tspin', last(SAMPLED)), True)} sampled"
        for name, what in _MENDED.items()
    )
    hurt = {name: study.estimate(f"fine-tuned, {name}", change(plan.SCORE)) for name in ("tspin", "sft", "spin")}
    harms = ", ".join(f"{LABELS[name]} {_hurts(estimate)}" for name, estimate in hurt.items())
    return f"{text} In greedy exact match {harms}; {', '.join(verdicts)}. Beside T-SPIN alone they change it: {helped}."


_MENDED = {
    "fine-tuned, tspin, drop_identical": "`drop_identical`",
    "fine-tuned, tspin, sft_coef 1": "`sft_coef` 1",
    "fine-tuned, tspin, both": "both",
}


def _hurts(estimate: Estimate | None) -> str:
    return "is pending" if estimate is None else "hurts" if _is_below_zero(estimate) else "is not seen to hurt"


def _mends(estimate: Estimate | None) -> str:
    return "is pending" if estimate is None else "does not mend it" if _is_below_zero(estimate) else "may mend it"


def _is_below_zero(estimate: Estimate) -> bool:
    return estimate.mean + (estimate.ci or 0.0) < 0


def _tuning_table(rows: Rows, rates: Mapping[str, float]) -> str:
    lines = []
    for method in METHODS:
        for rate, scores in tuning_scores(rows, method).items():
            name = f"{rate:.0e}".replace("e-0", "e-")
            chosen = "chosen" if rates.get(method) == rate else ""
            lines.append(
                [LABELS[method], name, f"{statistics.mean(scores):.3f}", ", ".join(f"{s:.3f}" for s in scores), chosen]
            )
    return table(["method", "rate", "validation, greedy", "by seed", ""], lines) if lines else "Pending."


def _account(rows: Rows) -> str:
    lines = []
    for arms in plan.phases(rows):
        ids = {arm.id: arm for arm in arms}
        done = [rows[id] for id in ids if id in rows]
        lines.append([_phase(arms), f"{len(done)} of {len(ids)}"])
    if pending := plan.unpaired(rows):
        lines.append(["again, from the pupil of what is compared with them", f"{len(pending)} to do"])
    whole = [row for row in rows.values() if row["cpu_s"] is not None]
    cpu, wall = (sum(row[key] for row in whole) / 3600 for key in ("cpu_s", "wall_s"))
    facts = [sorted({_software(row) for row in rows.values()}), sorted({row["machine"] for row in rows.values()})]
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    again = sum(" " in key for key in rows)
    text = f"""\
{len(rows) - again} arms have rows, {again} of them from two pupils. The {len(whole)} that were timed as a whole took
{cpu:.2f} hours of processor time ({3600 * cpu / max(1, len(whole)):.0f} s an arm) and {wall:.2f} hours by the clock, two at a time
beside other work; a pupil takes another 50 s a seed.
{"; ".join("; ".join(names) for names in facts)}. Commits: {commits}."""
    later = "Later phases are listed once the rates that they use are tuned." if len(plan.phases(rows)) < 8 else ""
    return "\n\n".join(filter(None, [table(["phase", "arms with a row"], lines), later, text]))


def _software(row: Mapping) -> str:
    return f"torch {row['versions']['torch']} and transformers {row['versions']['transformers']}"


def _phase(arms: Sequence[plan.Arm]) -> str:
    methods = list(dict.fromkeys(arm.keys["method"] for arm in arms))
    seeds = sorted({arm.seed for arm in arms})
    kind = "tuning" if arms[0].split == "valid" else "fine-tuned pi_0" if arms[0].start else None
    kind = kind or ("confirmation" if all(len(arm.keys) == 2 for arm in arms) else "controls")
    return f"{kind}: {', '.join(methods)}; seeds {', '.join(map(str, seeds))}"


def write(rows: Rows, folder: Path) -> Path:
    """Write STUDY.md and its figures into `folder` and return the page's path."""
    from benchmarks.study.figures import draw

    names = draw(Study.of(rows), folder)
    path = folder / "STUDY.md"
    path.write_text(page(rows, names), encoding="utf-8")
    return path
