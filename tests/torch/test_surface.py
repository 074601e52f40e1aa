# SPDX-License-Identifier: Apache-2.0
"""Every public name of the package has its text, and its parameters their types; what type checkers are
told of a call that has several forms is what it takes; and each operator that a compiler may meet has a
fake."""

import inspect
import typing

import torch

import cohort
from cohort import _library

failed, passed = [], 0


def check(name, ok):
    global passed
    passed += bool(ok)
    if not ok:
        failed.append(name)


def members(kind):
    for name, member in vars(kind).items():
        if (name == "__init__" or not name.startswith("_")) and (callable(member) or isinstance(member, property)):
            yield name, member.fget if isinstance(member, property) else member


def check_function(name, function):
    check(f"{name}: no text", function.__doc__ or name.endswith("__init__"))
    hints = inspect.signature(function)
    forms = getattr(typing, "get_overloads", lambda _: [])(function)  # from Python 3.11 on
    check(f"{name}: no type of its result", forms or name.endswith("__init__") or hints.return_annotation is not inspect.Signature.empty)
    for parameter in hints.parameters.values():
        typed = forms or parameter.name == "self" or parameter.annotation is not parameter.empty
        check(f"{name}: no type of {parameter.name}", typed)
    for form in forms:
        told = inspect.signature(form).parameters
        check(f"{name}: names that type checkers are told", list(told) == list(hints.parameters))
        for one in told.values():
            real = hints.parameters[one.name]
            check(f"{name}: kind of {one.name}", one.kind == real.kind)
            check(f"{name}: default of {one.name}", real.default is not one.empty or one.default is one.empty)


for name in cohort.__all__:
    public = getattr(cohort, name)
    if inspect.isclass(public):
        check(f"{name}: no text", public.__doc__)
        for member, function in members(public):
            check_function(f"{name}.{member}", function)
    else:
        check_function(name, inspect.unwrap(public))
for name in _library._WRITE + _library._SEND + _library._RETURN:
    op = getattr(torch.ops.cohort, name).default
    check(f"{name}: no fake", torch._library.simple_registry.singleton.find(f"cohort::{name}").fake_impl.kernel)
    check(f"{name}: its group is not named", op._schema.arguments[-1].name == "group")
for one in failed:
    print("FAIL", one)
print(f"cohort-test: passed={passed} failed={len(failed)} skipped=0")
raise SystemExit(bool(failed))
