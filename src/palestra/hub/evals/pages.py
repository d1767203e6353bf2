"""The pages and actions of evaluations, for the tables of the hub."""

from palestra.hub import answers as of_runs
from palestra.hub import queries as of_runs_queries
from palestra.hub.evals import answers, board, queries, views
from palestra.hub.registry.answers import Done
from palestra.hub.registry.ask import Action, Ask, Page
from palestra.hub.registry.queries import Nothing

HOME = "/{owner}/{environment}/evaluations"
_ONE = HOME + "/{evaluation}"


def _place(ask: Ask) -> tuple[str, str]:
    return ask.path["owner"], ask.path["environment"]


def leaderboard(ask: Ask) -> answers.Leaderboard:
    return board.listed(ask.hub, ask.who, *_place(ask), ask.query)


def evaluation(ask: Ask) -> answers.EvaluationPage:
    return views.evaluation(ask.hub, ask.who, *_place(ask), ask.path["evaluation"], url=ask.url)


def evaluation_rollouts(ask: Ask) -> answers.EvaluationRollouts:
    return views.rollouts(ask.hub, ask.who, *_place(ask), ask.path["evaluation"], ask.query)


def evaluation_rollout(ask: Ask) -> of_runs.Rollout:
    path = ask.path
    return views.rollout(ask.hub, ask.who, *_place(ask), path["evaluation"], path["file"], path["line"], ask.query)


def evaluation_comparison(ask: Ask) -> answers.EvaluationComparison:
    return views.comparison(ask.hub, ask.who, *_place(ask), ask.query)


def delete_evaluation(ask: Ask) -> Done:
    board.remove(ask.hub, ask.who, *_place(ask), ask.path["evaluation"])
    return Done(f"{'/'.join(_place(ask))}: {ask.path['evaluation']}")


PAGES = [
    Page(HOME, "Evaluations", queries.Board, answers.Leaderboard, leaderboard, "hub/evaluations.html"),
    Page(
        f"{HOME}/compare",
        "Two evaluations compared",
        queries.Comparison,
        answers.EvaluationComparison,
        evaluation_comparison,
        "hub/evaluation_compare.html",
    ),
    Page(_ONE, "One evaluation", Nothing, answers.EvaluationPage, evaluation, "hub/evaluation.html"),
    Page(
        f"{_ONE}/rollouts",
        "Rollouts of an evaluation",
        queries.Rollouts,
        answers.EvaluationRollouts,
        evaluation_rollouts,
        "hub/evaluation_rollouts.html",
    ),
    Page(
        f"{_ONE}/rollouts/{{file}}/{{line}}",
        "One rollout of an evaluation",
        of_runs_queries.Rollout,
        of_runs.Rollout,
        evaluation_rollout,
        "hub/evaluation_rollout.html",
    ),
]
ACTIONS = [Action(f"/api/environments{_ONE}/delete", "Delete an evaluation", Nothing, Done, delete_evaluation)]
