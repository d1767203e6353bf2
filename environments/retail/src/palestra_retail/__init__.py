"""Customer service of a shop: a policy, a database, tools, and a user with a wish."""

import re
from collections.abc import Callable
from random import Random
from typing import Any, get_args

from palestra.core.errors import UserError
from palestra.env import Agent, Environment, Frozen, Rollout, Task, metric
from palestra_retail.scenarios import Scenario, Wish, make
from palestra_retail.shop import POLICY, Shop

USER = """You are a customer who talks to the service of a shop. {knows}
Say a sentence or two at a time. Say only what you are asked for. Invent nothing. If you are refused, accept it.
When your wish is done or refused, say DONE and nothing else."""

_SUM = re.compile(r"\d+(?:[.,]\d+)?")


class Retail(Environment):
    """A user has a wish about an order; at the end the database must be as the wish and the policy want it."""

    system = POLICY
    max_turns = 30
    wishes: list[Wish] = list(get_args(Wish))
    forbidden: float = 0.4
    checked_with = ({}, {"forbidden": 0.0}, {"forbidden": 1.0, "wishes": ["cancel", "return"]})

    def tasks(self):
        if not self.wishes or not 0 <= self.forbidden <= 1:
            raise UserError(f"wishes={self.wishes} must name one at least, and forbidden={self.forbidden} be 0 to 1")
        chance, split = Random(f"{self.split} {self.seed}"), "train" if self.split == "train" else "test"
        while True:
            wish = chance.choice(self.wishes)
            yield task_of(make(chance, wish, is_allowed=chance.random() >= self.forbidden, split=split))

    async def run(self, task, agent, user: Frozen):
        shop = Shop(task.info["database"])
        user.system, agent.tools = USER.format(knows=task.info["knows"]), tools_of(shop, agent)
        try:
            said = await user("How can I help you?")
            while "DONE" not in said and (answer := await agent(said)) and not shop.is_transferred:
                said = await user(answer)
        finally:  # a limit ends `run` too
            is_right = shop.database == task.answer and shop.found == task.info["user"] and was_told(task, agent)
            agent.rewards["state"] = float(is_right)

    @metric
    def found(self, task: Task, rollout: Rollout) -> bool:
        looked = [message for message in rollout.messages if message.get("name") == "find_user"]
        return any(not message["content"].startswith("Error") for message in looked)

    @metric
    def user_turns(self, task: Task, rollout: Rollout) -> int:
        return sum(message["role"] == "user" for message in rollout.messages)


def was_told(task: Task, agent: Agent) -> bool:
    """The last words are not empty; and of a sum that was asked for, they name it and no other."""
    sums = {f"{float(found.replace(',', '.')):.2f}" for found in _SUM.findall(agent.reply)}
    return bool(agent.reply.strip()) and (not task.info["told"] or sums == {task.info["told"]})


def tools_of(shop: Shop, agent: Agent) -> list[Callable[..., Any]]:
    """What the agent may do in one rollout's shop."""

    def find_user(mail: str = "", name: str = "", postcode: str = "") -> dict[str, Any]:
        """Find a user by mail, or by name and postcode; with the ids of the user's orders."""
        shop.found = user_id = shop.find(mail=mail, name=name, postcode=postcode)
        orders = [order_id for order_id, order in shop.database["orders"].items() if order["user"] == user_id]
        return {"user_id": user_id, **shop.user(user_id), "orders": orders}

    def get_order(order_id: str) -> dict[str, Any]:
        """Status, items and address of an order."""
        return shop.order(order_id)

    def get_product(product: str) -> dict[str, Any]:
        """The variants of a product, and how many are in stock."""
        return shop.product(product)

    def cancel_order(order_id: str, reason: str) -> str:
        """Cancel a pending order."""
        shop.cancel(order_id, reason)
        return f"{order_id} is cancelled"

    def change_address(order_id: str, address: str) -> str:
        """Change where a pending order is sent to."""
        shop.change_address(order_id, address)
        return f"{order_id} goes to {address}"

    def return_items(order_id: str, items: list[str]) -> str:
        """Return items of a delivered order, by their ids."""
        return f"{shop.return_items(order_id, items):.2f} are paid back"

    def exchange_item(order_id: str, item: str, variant: str) -> str:
        """Exchange an item of a delivered order, by its id, for another variant of the same product."""
        shop.exchange(order_id, item, variant)
        return f"{item} is exchanged for {variant}"

    def transfer(reason: str) -> str:
        """Give the conversation to a person; it ends here."""
        shop.is_transferred = True
        agent.stop()
        return "transferred"

    tools = (find_user, get_order, get_product, cancel_order, change_address, return_items, exchange_item)
    return [*tools, transfer]


TOOLS = {"cancel": "cancel_order", "exchange": "exchange_item"}  # of actions that are called otherwise


def task_of(scenario: Scenario) -> Task:
    mail = scenario.database["users"][scenario.user_id]["mail"]
    calls = [("find_user", {"mail": mail})]
    calls += [(TOOLS.get(name, name), arguments) for name, arguments in scenario.actions]
    answer = f"That is {scenario.told}." if scenario.told else "Done." if scenario.is_allowed else "I cannot do that."
    return Task(
        prompt=scenario.says,
        answer=scenario.wanted,
        info={
            "wish": scenario.wish,
            "is_allowed": scenario.is_allowed,
            "database": scenario.database,
            "knows": scenario.knows,
            "told": scenario.told,
            "user": scenario.user_id,
        },
        gold={"user": [scenario.says, "DONE"], "agent": [*({"calls": [call]} for call in calls), answer]},
    )
