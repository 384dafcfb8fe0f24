"""The reward accuracy of a policy that still equals its reference is a tie."""

from dpo_runner.config.metrics import find_first_update, mark_ties
from dpo_runner.config.sections.model import ModelConf


def test_accuracies_are_ties_until_the_first_update_unless_the_reference_is_another_model() -> None:
    figures = {"eval_rewards/accuracies": 0.29, "eval_math_rewards/accuracies": 0.3, "eval_rewards/margins": 1e-4}
    tied = {"eval_rewards/accuracies": "tie", "eval_math_rewards/accuracies": "tie", "eval_rewards/margins": 1e-4}
    for model in (ModelConf("x"), ModelConf("x", adapter="sft"), ModelConf("x", reference="base")):
        assert mark_ties(figures, 0, model) == tied and mark_ties(figures, 1, model) == figures
    for model in (ModelConf("x", reference="other"), ModelConf("x", adapter="sft", reference="base")):
        assert mark_ties(figures, 0, model) == figures


def test_a_step_is_logged_after_its_update_and_a_warm_up_may_begin_with_a_step_that_changes_nothing() -> None:
    figures, model = {"rewards/accuracies": 0.29}, ModelConf("x")
    for rate, first in ((1e-4, 1), (0.0, 2)):
        assert find_first_update([{"step": 0, "eval_loss": 0.7}, {"step": 1, "learning_rate": rate}]) == first
        ties = [step for step in (1, 2, 3) if mark_ties(figures, step, model, first) != figures]
        assert ties == list(range(1, first + 1))
