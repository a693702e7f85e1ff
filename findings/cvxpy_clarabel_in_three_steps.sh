#!/usr/bin/env bash
# cvxpy 1.9.3: the documented three steps to solve a problem fail at the last one with Clarabel, its default cone solver.
#
# To get at what a solver says beyond cvxpy's own attributes, cvxpy documents three steps: get_problem_data(solver),
# chain.solve_via_data(problem, data), problem.unpack_results(solution, chain, inverse_data). One would expect them to do
# what problem.solve(solver=...) does, as they do with SCS. With Clarabel unpack_results raises TypeError ("argument of
# type 'NoneType' is not iterable"), although the solver has found the optimum: the solver's options are looked through for
# one of their names, and get_problem_data leaves them None. get_problem_data(solver, solver_opts={}) works.
# It matters to whoever wants the duality gap: problem.solver_stats.extra_stats is None with Clarabel.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'cvxpy==1.9.3' 'clarabel==0.11.1' 'numpy==2.4.6' 'scipy==1.17.1' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys

import cvxpy as cp


def three_steps(solver, **settings):
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.norm(x - 1)), [x <= 0])
    data, chain, inverse = problem.get_problem_data(solver, **settings)
    solution = chain.solve_via_data(problem, data)
    try:
        problem.unpack_results(solution, chain, inverse)
    except TypeError as error:
        return f"TypeError: {error} (the solver's status: {solution.status})"
    return f"{problem.status}, {problem.value:.4f}"


x = cp.Variable(2)
problem = cp.Problem(cp.Minimize(cp.norm(x - 1)), [x <= 0])
problem.solve(solver="CLARABEL")
stats = problem.solver_stats.extra_stats
seen = {
    "solve(), CLARABEL": f"{problem.status}, {problem.value:.4f}",
    "its extra_stats": str(stats),
    "three steps, SCS": three_steps("SCS"),
    "three steps, CLARABEL": three_steps("CLARABEL"),
    "three steps, CLARABEL, solver_opts={}": three_steps("CLARABEL", solver_opts={}),
}
for what, value in seen.items():
    print(f"{what}: {value}")
values = list(seen.values())
same = (
    values[0] == values[2] == values[4] == "optimal, 1.4142"
    and values[1] == "None"
    and values[3].startswith("TypeError: argument of type 'NoneType'")
    and "Solved" in values[3]
)
sys.exit(0 if same else 1)
PY
