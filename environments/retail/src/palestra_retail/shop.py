"""The shop: its database, and what the policy says of it. A database is plain JSON, so that two can be compared."""

from copy import deepcopy
from typing import Any

TODAY = 100  # days are counted from a beginning that does not matter
RETURN_DAYS = 30
REASONS = ("no longer needed", "ordered by mistake")

POLICY = f"""You serve the customers of a shop, by the tools and by this policy.
- Before anything else find the user, by mail, or by name and postcode. Speak of nobody else's orders.
- An order that is pending can be cancelled ({" or ".join(REASONS)}), and its address changed. No other order can.
- Items of a delivered order can be returned for at most {RETURN_DAYS} days after delivery; the price is paid back.
- An item of a delivered order can be exchanged, within the same days, for another variant of the same product that
  is in stock; never for another product.
- What is not allowed is refused, however the user asks. Transfer to a person only what the policy does not speak of.
Do at most what the user asked for. Tell the user the result."""


class RefusedError(Exception):
    """The shop does not do it; the agent is told why."""


class Shop:
    """One rollout's database with its operations; each either happens as a whole or raises RefusedError."""

    def __init__(self, database: dict[str, Any]):
        self.database = deepcopy(database)
        self.found = ""  # the user who was looked up last
        self.is_transferred = False

    def user(self, user_id: str) -> dict[str, Any]:
        return _known(self.database["users"], user_id, "user")

    def order(self, order_id: str) -> dict[str, Any]:
        return _known(self.database["orders"], order_id, "order")

    def product(self, product: str) -> dict[str, Any]:
        return _known(self.database["products"], product, "product")

    def find(self, *, mail: str = "", name: str = "", postcode: str = "") -> str:
        for user_id, user in self.database["users"].items():
            if mail and user["mail"] == mail.strip().lower():
                return user_id
            if (
                name
                and postcode
                and (user["name"].lower(), user["postcode"]) == (name.strip().lower(), postcode.strip())
            ):
                return user_id
        raise RefusedError("no such user")

    def cancel(self, order_id: str, reason: str) -> None:
        order = self._with_status(order_id, "pending")
        if reason not in REASONS:
            raise RefusedError(f"the reason must be one of: {', '.join(REASONS)}")
        order |= {"status": "cancelled", "reason": reason}

    def change_address(self, order_id: str, address: str) -> None:
        self._with_status(order_id, "pending")["address"] = address.strip()

    def return_items(self, order_id: str, items: list[str]) -> float:
        """What is paid back."""
        order = self._returnable(order_id)
        refund = self.refund(order_id, items)
        order["returned"] = sorted([*order["returned"], *items])
        return refund

    def refund(self, order_id: str, items: list[str]) -> float:
        order = self.order(order_id)
        if not items or len(set(items)) != len(items):
            raise RefusedError("name every item once")
        for item in items:
            if item not in order["items"] or item in order["returned"]:
                raise RefusedError(f"{item} is no item of {order_id} that the user still has")
        return round(sum(order["items"][item]["price"] for item in items), 2)

    def exchange(self, order_id: str, item: str, variant: str) -> None:
        order = self._returnable(order_id)
        self.refund(order_id, [item])
        bought = order["items"][item]
        variants = self.product(bought["product"])["variants"]
        if variant not in variants or variant == bought["variant"]:
            raise RefusedError(
                f"{variant} is no other variant of {bought['product']}; there are: {', '.join(variants)}"
            )
        if not variants[variant]["stock"]:
            raise RefusedError(f"{bought['product']} in {variant} is not in stock")
        variants[variant]["stock"] -= 1
        bought["variant"] = variant

    def _with_status(self, order_id: str, status: str) -> dict[str, Any]:
        order = self.order(order_id)
        if order["status"] != status:
            raise RefusedError(f"{order_id} is {order['status']}, not {status}")
        return order

    def _returnable(self, order_id: str) -> dict[str, Any]:
        order = self._with_status(order_id, "delivered")
        if TODAY - order["delivered"] > RETURN_DAYS:
            raise RefusedError(f"{order_id} was delivered {TODAY - order['delivered']} days ago")
        return order


def _known(table: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    if key not in table:
        raise RefusedError(f"there is no {what} {key}")
    return table[key]
