"""Shops, users and their wishes, made by chance."""

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from palestra_retail.shop import REASONS, RETURN_DAYS, TODAY, Shop

Wish = Literal["cancel", "return", "exchange", "address", "refund"]

FIRST = {
    "train": ["Ana", "Bo", "Carla", "Dimitri", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Lena"],
    "test": ["Quentin", "Rosa", "Samir", "Tova", "Umberto", "Vera", "Wen", "Ximena", "Yusuf", "Zoe"],
}
LAST = ["Abe", "Berg", "Costa", "Dahl", "Engel", "Fuchs", "Garcia", "Holm", "Ito", "Jensen", "Kaya", "Lopez", "Meyer"]
STREETS = ["Birch Street", "Harbour Road", "Mill Lane", "Station Square", "Garden Row", "King's Way"]
PRODUCTS = {
    "shirt": ("red", "blue", "green"),
    "lamp": ("brass", "steel", "white"),
    "kettle": ("black", "silver"),
    "backpack": ("grey", "navy", "olive"),
    "headphones": ("wired", "wireless"),
    "chair": ("oak", "walnut", "ash"),
}


@dataclass(frozen=True)
class Scenario:
    """One wish. `actions` are what a good agent does, as names of `Shop` methods with their arguments; none, if the
    policy forbids it. `told` must be said by the agent."""

    wish: Wish
    is_allowed: bool
    database: dict[str, Any]
    user_id: str
    says: str  # the first words of the user
    knows: str  # for whoever plays the user
    actions: tuple[tuple[str, dict[str, Any]], ...]
    told: str = ""

    @property
    def wanted(self) -> dict[str, Any]:
        """The database as it should be at the end."""
        shop = Shop(self.database)
        for name, arguments in self.actions:
            getattr(shop, name)(**arguments)
        return shop.database


def make(chance: Random, wish: Wish, *, is_allowed: bool, split: str) -> Scenario:
    database = _database(chance, split)
    user_id = chance.choice(sorted(database["users"]))
    order_id = chance.choice(sorted(o for o, order in database["orders"].items() if order["user"] == user_id))
    order = database["orders"][order_id]
    items = sorted(order["items"])
    if wish in ("cancel", "address"):
        order |= {"status": "pending" if is_allowed else chance.choice(["shipped", "delivered"])}
        order["delivered"] = TODAY - 3 if order["status"] == "delivered" else None
    else:
        ago = chance.randint(1, RETURN_DAYS) if is_allowed else chance.randint(RETURN_DAYS + 1, 90)
        order |= {"status": "delivered", "delivered": TODAY - ago}
    says, action, told = _asked(chance, wish, database, order_id, items, is_allowed=is_allowed)
    user = database["users"][user_id]
    who = chance.choice([f"mail {user['mail']}", f"name {user['name']}, postcode {user['postcode']}"])
    return Scenario(
        wish=wish,
        is_allowed=is_allowed,
        database=database,
        user_id=user_id,
        says=f"Hello. {says}",
        knows=f"You are {user['name']}. If you are asked who you are: {who}. What you want: {says}",
        actions=(action,) if action and is_allowed else (),
        told=told if is_allowed else "",
    )


def _asked(
    chance: Random, wish: Wish, database: dict[str, Any], order_id: str, items: list[str], *, is_allowed: bool
) -> tuple[str, tuple[str, dict[str, Any]] | None, str]:
    """What the user says, what is to be done, and what is to be told."""
    if wish == "cancel":
        reason = chance.choice(REASONS)
        return f"Cancel my order {order_id}: {reason}.", ("cancel", {"order_id": order_id, "reason": reason}), ""
    if wish == "address":
        address = f"{chance.randint(1, 99)} {chance.choice(STREETS)}"
        says = f"Send my order {order_id} to {address}."
        return says, ("change_address", {"order_id": order_id, "address": address}), ""
    chosen = sorted(chance.sample(items, chance.randint(1, len(items))))
    names = " and ".join(chosen)
    if wish == "return":
        return f"Return {names} of my order {order_id}.", ("return_items", {"order_id": order_id, "items": chosen}), ""
    if wish == "refund":
        paid = f"{Shop(database).refund(order_id, chosen):.2f}"
        says = f"How much do I get back if I return {names} of my order {order_id}? Do not return anything yet."
        return says, None, paid
    item = chosen[0]
    bought = database["orders"][order_id]["items"][item]
    variants = database["products"][bought["product"]]["variants"]
    other = chance.choice([variant for variant in variants if variant != bought["variant"]])
    variants[other]["stock"] = chance.randint(1, 5)
    says = f"Exchange {item} of my order {order_id} for the {other} one."
    return says, ("exchange", {"order_id": order_id, "item": item, "variant": other}), ""


def _database(chance: Random, split: str) -> dict[str, Any]:
    products = {
        name: {"variants": {variant: {"stock": chance.randint(0, 5)} for variant in variants}}
        for name, variants in PRODUCTS.items()
    }
    users: dict[str, Any] = {}
    orders: dict[str, Any] = {}
    names = chance.sample([f"{first} {last}" for first in FIRST[split] for last in LAST], 4)
    numbers = iter(chance.sample(range(10**6), 20))  # no two orders have one
    for name in names:
        user_id = f"u{next(numbers):06d}"
        mail = f"{name.lower().replace(' ', '.')}@example.com"
        users[user_id] = {"name": name, "mail": mail, "postcode": f"{chance.randrange(10**5):05d}"}
        for _ in range(chance.randint(1, 3)):
            orders[f"#W{next(numbers):06d}"] = _order(chance, user_id)
    return {"products": products, "users": users, "orders": orders}


def _order(chance: Random, user_id: str) -> dict[str, Any]:
    status = chance.choice(["pending", "shipped", "delivered"])
    bought = chance.sample(sorted(PRODUCTS), chance.randint(1, 3))
    return {
        "user": user_id,
        "status": status,
        "delivered": TODAY - chance.randint(1, 60) if status == "delivered" else None,
        "address": f"{chance.randint(1, 99)} {chance.choice(STREETS)}",
        "items": {
            f"i{number}-{product}": {
                "product": product,
                "variant": chance.choice(PRODUCTS[product]),
                "price": chance.randint(500, 20_000) / 100,
            }
            for number, product in enumerate(bought, 1)
        },
        "returned": [],
    }
