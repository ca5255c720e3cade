"""All hooks that torch.optim knows, recorded."""

from contextlib import ExitStack

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ORDER = [
    *("global pre", "pre", "pre 2", "closure", "post", "post 2", "global post"),
    *("save pre first", "save pre", "save post first", "save post"),
    *("load pre first", "load pre", "load post first", "load post"),
]
"""In which torch.optim calls them."""


def calls_of_hooks(optimizer, closure=lambda: None):
    """Step and load with every hook, and again without; return what was called, with what kinds of arguments.

    The order is torch's, each hook gets the optimizer, and none is called after its handle is removed.
    """
    events = []

    def record(text):
        def hook(given, *args):
            assert given is optimizer
            events.append((text, *[type(arg).__name__ for arg in args]))

        return hook

    def recorded_closure():
        events.append(("closure",))
        return closure()

    def run():
        optimizer.step(recorded_closure)
        optimizer.load_state_dict(optimizer.state_dict())

    with ExitStack() as handles:
        for handle in (
            register_optimizer_step_pre_hook(record("global pre")),
            register_optimizer_step_post_hook(record("global post")),
            optimizer.register_step_pre_hook(record("pre")),
            optimizer.register_step_pre_hook(record("pre 2")),
            optimizer.register_step_post_hook(record("post")),
            optimizer.register_step_post_hook(record("post 2")),
            optimizer.register_state_dict_pre_hook(record("save pre")),
            optimizer.register_state_dict_pre_hook(record("save pre first"), prepend=True),
            optimizer.register_state_dict_post_hook(record("save post")),
            optimizer.register_state_dict_post_hook(record("save post first"), prepend=True),
            optimizer.register_load_state_dict_pre_hook(record("load pre")),
            optimizer.register_load_state_dict_pre_hook(record("load pre first"), prepend=True),
            optimizer.register_load_state_dict_post_hook(record("load post")),
            optimizer.register_load_state_dict_post_hook(record("load post first"), prepend=True),
        ):
            handles.enter_context(handle)
        run()
    names = [name for name, *_ in events]
    assert list(dict.fromkeys(names)) == ORDER
    assert all(names.count(name) == 1 for name in ORDER if name != "closure")  # which L-BFGS calls several times
    called = len(events)
    run()
    assert {name for name, *_ in events[called:]} == {"closure"}
    return events
