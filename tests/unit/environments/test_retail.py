"""The shop and its service: the policy by hand, and what a good, a bad and an idle agent earn."""

from itertools import islice
from random import Random

import pytest
from palestra_retail import Retail, task_of
from palestra_retail.scenarios import make
from palestra_retail.shop import TODAY, RefusedError, Shop

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.env.check import odd_scripts
from palestra.env.play import score

DATABASE = {
    "products": {"lamp": {"variants": {"brass": {"stock": 1}, "steel": {"stock": 0}}}},
    "users": {"u1": {"name": "Ana Abe", "mail": "ana.abe@example.com", "postcode": "01234"}},
    "orders": {
        "#1": {
            "user": "u1",
            "status": "delivered",
            "delivered": TODAY - 30,
            "address": "1 Mill Lane",
            "items": {
                "i1-lamp": {"product": "lamp", "variant": "steel", "price": 10.25},
                "i2-lamp": {"product": "lamp", "variant": "brass", "price": 5.5},
            },
            "returned": [],
        },
        "#2": {
            "user": "u1",
            "status": "pending",
            "delivered": None,
            "address": "1 Mill Lane",
            "items": {"i1-lamp": {"product": "lamp", "variant": "brass", "price": 5.0}},
            "returned": [],
        },
    },
}


def test_users_are_found_by_mail_or_by_name_and_postcode():
    shop = Shop(DATABASE)
    assert shop.find(mail=" ANA.abe@example.com ") == "u1"
    assert shop.find(name="ana abe", postcode="01234") == "u1"
    for unknown in ({"mail": "bo@example.com"}, {"name": "Ana Abe"}, {"name": "Ana Abe", "postcode": "9"}, {}):
        with pytest.raises(RefusedError, match="no such user"):
            shop.find(**unknown)


def test_what_was_delivered_can_be_returned_for_thirty_days_and_each_item_once():
    shop = Shop(DATABASE)
    assert shop.return_items("#1", ["i2-lamp", "i1-lamp"]) == 15.75
    with pytest.raises(RefusedError, match="still has"):
        shop.return_items("#1", ["i1-lamp"])
    late = Shop(DATABASE)
    late.order("#1")["delivered"] -= 1
    with pytest.raises(RefusedError, match="31 days ago"):
        late.return_items("#1", ["i1-lamp"])
    with pytest.raises(RefusedError, match="not delivered"):
        Shop(DATABASE).return_items("#2", ["i1-lamp"])
    for items in ([], ["i1-lamp", "i1-lamp"], ["i9"]):
        with pytest.raises(RefusedError):
            Shop(DATABASE).return_items("#1", items)


def test_an_exchange_takes_another_variant_of_the_same_product_from_stock():
    shop = Shop(DATABASE)
    shop.exchange("#1", "i1-lamp", "brass")
    assert shop.order("#1")["items"]["i1-lamp"]["variant"] == "brass"
    assert shop.product("lamp")["variants"]["brass"]["stock"] == 0
    for item, variant in (("i2-lamp", "steel"), ("i2-lamp", "brass"), ("i2-lamp", "chair")):
        with pytest.raises(RefusedError):
            shop.exchange("#1", item, variant)


def test_only_what_is_pending_is_cancelled_or_sent_elsewhere():
    shop = Shop(DATABASE)
    shop.change_address("#2", "2 Mill Lane ")
    assert shop.order("#2")["address"] == "2 Mill Lane"
    with pytest.raises(RefusedError, match="the reason must be one of"):
        shop.cancel("#2", "I am bored")
    shop.cancel("#2", "no longer needed")
    for change in (lambda: shop.cancel("#2", "no longer needed"), lambda: shop.change_address("#1", "x")):
        with pytest.raises(RefusedError):
            change()
    assert DATABASE["orders"]["#2"]["status"] == "pending"  # of another rollout


@pytest.mark.parametrize("wish", ["cancel", "return", "exchange", "address", "refund"])
@pytest.mark.parametrize("is_allowed", [True, False])
def test_what_the_policy_allows_can_be_done_and_what_it_forbids_is_refused_by_the_shop(wish, is_allowed):
    chance = Random(f"{wish} {is_allowed}")
    for _ in range(50):
        scenario = make(chance, wish, is_allowed=is_allowed, split="train")
        changes = scenario.wanted != scenario.database
        assert changes == (is_allowed and wish != "refund")


async def test_gold_earns_one_and_doing_nothing_nothing_also_where_nothing_is_to_be_done():
    for task in islice(Retail(seed=3).tasks(), 60):
        record = await score(Retail(), task, task.gold)
        assert (record.ending, record.reward) == (Ending.OK, 1.0), (task.info["wish"], record.error)
        assert record.metrics["found"] == 1.0
        for words in (["No."], [""], []):
            idle = await score(Retail(), task, {"user": [task.prompt, "DONE"], "agent": words})
            assert (idle.reward, idle.ending == Ending.INVALID) == (0.0, False)


async def test_what_is_done_against_the_policy_or_beyond_the_wish_earns_nothing():
    tasks = [task_of(make(Random(number), "return", is_allowed=True, split="train")) for number in range(20)]
    for task in tasks:
        (_, calls) = task.gold["agent"][1]["calls"][0]
        order = task.info["database"]["orders"][calls["order_id"]]
        left = [item for item in order["items"] if item not in calls["items"]]
        if not left:
            continue
        more = {"calls": [("return_items", {"order_id": calls["order_id"], "items": left[:1]})]}
        greedy = {**task.gold, "agent": [*task.gold["agent"][:-1], more, "Done."]}
        assert (await score(Retail(), task, greedy)).reward == 0.0


async def test_a_refund_must_be_told():
    task = task_of(make(Random(5), "refund", is_allowed=True, split="train"))
    told = task.info["told"]
    find, _ = task.gold["agent"]
    for answer, reward in (
        (f"You get {told} back.", 1.0),
        (f"{float(told) + 1:.2f}", 0.0),
        (f"{told} or {float(told) + 1:.2f}", 0.0),
        ("Some.", 0.0),
    ):
        record = await score(Retail(), task, {"user": [task.prompt, "DONE"], "agent": [find, answer]})
        assert record.reward == reward


async def test_a_limit_is_scored_by_the_state_it_leaves():
    task = task_of(make(Random(5), "cancel", is_allowed=True, split="train"))
    script = {"user": [task.prompt, *["Go on."] * 40], "agent": [*task.gold["agent"], *["Done."] * 40]}
    record = await score(Retail(), task, script)
    assert (record.ending, record.reward) == (Ending.TRUNCATED, 1.0)


async def test_a_transfer_ends_the_conversation():
    task = task_of(make(Random(5), "cancel", is_allowed=False, split="train"))
    transfer = {"calls": [("transfer", {"reason": "angry"})], "content": "A person will help you."}
    record = await score(Retail(), task, {"user": [task.prompt], "agent": [task.gold["agent"][0], transfer]})
    assert (record.ending, record.reward, record.messages[-1]["content"]) == (Ending.OK, 1.0, "transferred")
    silent = await score(Retail(), task, {"user": [task.prompt], "agent": [{**transfer, "content": ""}]})
    assert (silent.ending, silent.reward) == (Ending.OK, 0.0)


def test_wrong_arguments_are_refused():
    for wrong in ({"wishes": []}, {"forbidden": 2.0}, {"wishes": ["sing"]}):
        with pytest.raises(UserError):
            next(iter(Retail(**wrong).tasks()))


async def test_odd_replies_are_scored_and_earn_less_than_one():
    for task in islice(Retail(seed=4).tasks(), 5):
        for script in odd_scripts(Retail()).values():
            record = await score(Retail(), task, script(task))
            assert record.ending != Ending.INVALID, record.error
            assert record.reward < 1
