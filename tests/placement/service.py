"""Asks OpenStack Placement, in this process, about random inventories and claims, and prints what it answered.

A line is one question with its HTTP status; parity.rs puts the same to the ledger.
"""
import logging
import os
import random
import sys
import tempfile
import uuid
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

from oslo_config import cfg  # noqa: E402
from placement import conf, direct  # noqa: E402

CLASSES = ("MEMORY_MB", "VCPU")


def inventory(rng, big):
    """An inventory that Placement's schema takes; now and then one with more reserved than there is."""
    total = rng.randint(1, big)
    low = rng.choice([1, 1, 1, rng.randint(1, max(1, total // 8))])
    return {
        "total": total,
        "reserved": rng.choice([0, rng.randint(0, total), total, rng.randint(0, total + 3)]),
        "allocation_ratio": rng.choice([1.0, 1.5, 4.0, 16.0, 0.1, 1 / 3, rng.uniform(0.01, 20), rng.uniform(0.9, 1.1)]),
        "min_unit": low,
        "max_unit": rng.choice([total, rng.randint(low, 2 * total + low), 2147483647]),
        "step_size": rng.choice([1, 1, 2, 3, rng.randint(1, 64)]),
    }


class Provider:
    def __init__(self, client, rng):
        self.client, self.rng = client, rng
        self.uuid, self.generation = str(uuid.UUID(int=rng.getrandbits(128))), 0
        self.held, self.generations = {}, {}
        self.inventories = None
        body = {"name": self.uuid, "uuid": self.uuid}
        assert client.post("/resource_providers", json=body).status_code == 200

    def set_inventories(self):
        wanted = {CLASSES[0]: inventory(self.rng, 100000), CLASSES[1]: inventory(self.rng, 256)}
        url = f"/resource_providers/{self.uuid}"
        now = self.client.get(url).json()["generation"]
        body = {"resource_provider_generation": now, "inventories": wanted}
        status = self.client.put(url + "/inventories", json=body).status_code
        if status == 200:
            self.inventories = wanted
        fields = [str(wanted[c][f]) for c in CLASSES for f in ("total", "reserved", "min_unit", "max_unit", "step_size")]
        ratios = [repr(wanted[c]["allocation_ratio"]) for c in CLASSES]
        print("inventories", *fields, *ratios, status)
        return status == 200

    def amount(self, name, consumer):
        """Often just what is left, or one more; often what breaks no unit rule."""
        rng, inv = self.rng, self.inventories[name]
        used = sum(h[name] for c, h in self.held.items() if c != consumer)
        left = int((inv["total"] - inv["reserved"]) * inv["allocation_ratio"]) - used
        amount = rng.choice([left, left + 1, inv["max_unit"], rng.randint(1, inv["total"])] + 8 * [left // rng.randint(2, 40)])
        if rng.random() < 0.8:
            amount = min(amount, max(left // 2, inv["min_unit"]), inv["max_unit"])
        if rng.random() < 0.9:
            amount = max(amount, inv["min_unit"])
            amount += -amount % inv["step_size"]
        if consumer in self.held and rng.random() < 0.6:
            amount = self.held[consumer][name] + rng.choice([-1, 1]) * inv["step_size"]
        return min(max(amount, 1), 2147483647)

    def put(self, consumer, wanted, generation):
        body = {
            "allocations": {self.uuid: {"resources": wanted}},
            "project_id": "p", "user_id": "u", "consumer_generation": generation, "consumer_type": "INSTANCE",
        }
        return self.client.put(f"/allocations/{uuid.UUID(int=consumer)}", json=body).status_code

    def claim(self, consumer):
        """A new consumer, or a change of one, of its present generation or of an older one."""
        new = consumer not in self.held
        wanted = {name: self.amount(name, consumer) for name in CLASSES}
        if not new and any(wanted[n] == self.held[consumer][n] for n in CLASSES):
            # The ledger does not apply unit rules to what does not change; see docs/overcommit.md.
            return False
        generation = None if new else self.generations[consumer]
        stale = not new and generation > 1 and self.rng.random() < 0.1
        status = self.put(consumer, wanted, generation - 1 if stale else generation)
        assert status in (204, 409), status
        if status == 204:
            self.held[consumer] = wanted
            self.generations[consumer] = (generation or 0) + 1
        word = "claim" if new else "stale" if stale else "change"
        print(word, consumer, wanted[CLASSES[0]], wanted[CLASSES[1]], status)
        return True

    def drop(self, consumer):
        assert self.client.delete(f"/allocations/{uuid.UUID(int=consumer)}").status_code == 204
        del self.held[consumer], self.generations[consumer]
        print("drop", consumer, 204)


def main(claims, seed):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config.set_override("connection", "sqlite:///" + os.path.join(scratch, "db"), group="placement_database")
        config.set_override("sync_on_startup", True, group="placement_database")
        config([], default_config_files=[])
        with direct.PlacementDirect(config, latest_microversion=True) as client:
            done, next_consumer = 0, 1
            while done < claims:
                print("provider", 0)
                provider = Provider(client, rng)
                while not provider.set_inventories():
                    pass
                for _ in range(rng.randint(5, 60)):
                    known = list(provider.held)
                    what = rng.random()
                    if what < 0.06:
                        provider.set_inventories()
                    elif what < 0.15 and known:
                        provider.drop(rng.choice(known))
                    elif what < 0.6 and known:
                        done += provider.claim(rng.choice(known))
                    else:
                        done += provider.claim(next_consumer)
                        next_consumer += 1
                for consumer in list(provider.held):
                    provider.drop(consumer)


main(int(sys.argv[1]), int(sys.argv[2]))
