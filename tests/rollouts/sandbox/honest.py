"""Honest programs, which must pass their tests, by name: the source and the tests."""

HONEST: dict[str, tuple[str, list]] = {
    "arithmetic": ("def square(n):\n    return n * n", ["assert square(3) == 9", "assert 4 == square(-2)"]),
    "float_where_a_whole_number_is_expected": (
        "import math\ndef root(n): return math.sqrt(n)",
        ["assert root(16) == 4", "assert abs(root(2) - 1.41421356) < 1e-6"],
    ),
    "truths": (
        "def is_prime(n): return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))",
        ["assert is_prime(7)", "assert not is_prime(9)", "assert is_prime(2) == True", "assert is_prime(1) is False"],
    ),
    "nothing": ("def first(l): return l[0] if l else None", ["assert first([]) is None", "assert first([1]) == 1"]),
    "counter_where_a_dict_is_expected": (
        "from collections import Counter\ndef count(s): return Counter(s)",
        ["assert count('abca') == {'a': 2, 'b': 1, 'c': 1}"],
    ),
    "default_dict": (
        "from collections import defaultdict\ndef groups(l):\n    d = defaultdict(list)\n"
        "    for w in l: d[len(w)].append(w)\n"
        "    return d",
        ["assert groups(['a', 'bb', 'c']) == {1: ['a', 'c'], 2: ['bb']}"],
    ),
    "named_tuple": (
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int\ndef point(): return P(1, 2)",
        ["assert point() == (1, 2)"],
    ),
    "sets": ("def common(a, b): return set(a) & set(b)", ["assert common([1, 2, 3], [3, 2]) == {2, 3}"]),
    "nested_data": (
        "def table(n): return [{'n': i, 't': (i, [i ** 2])} for i in range(n)]",
        ["assert table(2) == [{'n': 0, 't': (0, [0])}, {'n': 1, 't': (1, [1])}]"],
    ),
    "bytes_and_complex": (
        "def b(s): return s.encode()\ndef c(x): return complex(x, 1)",
        ["assert b('é') == b'\\xc3\\xa9'", "assert c(2) == 2 + 1j"],
    ),
    "large_numbers": (
        "def fact(n): return n * fact(n - 1) if n else 1",
        ["assert fact(40) == 815915283247897734345611269596115894272000000000"],
    ),
    "very_large_numbers": (
        "def power(n): return 7 ** n",
        ["assert power(6000) % 1000 == 1", "assert len(hex(power(6000))) == 4214"],
    ),
    "text": ("def back(s): return s[::-1]", ["assert back('añ😀\\ud800') == '\\ud800😀ña'", "assert back('') == ''"]),
    "infinity": (
        "def best(l): return max(l, default=float('-inf'))",
        ["assert best([]) == -1e999", "assert best([1.5]) == 1.5"],
    ),
    "deep_recursion": (
        "import sys\nsys.setrecursionlimit(20000)\ndef depth(n): return 0 if n == 0 else 1 + depth(n - 1)",
        ["assert depth(9000) == 9000"],
    ),
    "data_class": (
        "from __future__ import annotations\nfrom dataclasses import dataclass, asdict\n@dataclass(order=True)\n"
        "class Item:\n    price: int\n    name: str = 'x'\ndef cheapest(l): return asdict(min(Item(p) for p in l))",
        ["assert cheapest([3, 1]) == {'price': 1, 'name': 'x'}"],
    ),
    "method_of_a_class": (
        "from typing import List\nclass Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n"
        "        seen = {}\n        for i, n in enumerate(nums):\n"
        "            if target - n in seen: return [seen[target - n], i]\n"
        "            seen[n] = i",
        ['{"call": "Solution().twoSum([2, 7, 11, 15], 9)", "expected": [0, 1]}'],
    ),
    "memory": (
        "from functools import lru_cache\n@lru_cache(None)\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)",
        ["assert fib(80) == 23416728348467685"],
    ),
    "modules": (
        "import heapq, itertools, bisect, re, statistics, hashlib, datetime, decimal, fractions, string, operator\n"
        "def run():\n    assert heapq.nsmallest(1, [2, 1]) == [1]\n"
        "    return [re.findall(r'\\d', 'a1b2'), statistics.mean([1, 3]),\n"
        "        hashlib.sha256(b'').hexdigest()[:8], str(datetime.date(2024, 2, 29)), "
        "str(decimal.Decimal('0.1') * 3),\n"
        "        str(fractions.Fraction(1, 3)), list(itertools.accumulate([1, 2, 3])), bisect.bisect([1, 3], 2)]",
        ["assert run() == [['1', '2'], 2, 'e3b0c442', '2024-02-29', '0.3', '1/3', [1, 3, 6], 1]"],
    ),
    "database": (
        "import sqlite3\ndef run():\n    d = sqlite3.connect(':memory:')\n    d.execute('create table t (x)')\n"
        "    d.executemany('insert into t values (?)', [(1,), (2,)])\n"
        "    return d.execute('select sum(x) from t').fetchone()",
        ["assert run() == (3,)"],
    ),
    "files": (
        "import tempfile, os, shutil, csv, pathlib\ndef run():\n"
        "    with open('a.csv', 'w', newline='') as f: csv.writer(f).writerow([1, 'x'])\n"
        "    os.makedirs('d/e')\n    shutil.copyfile('a.csv', 'd/e/b.csv')\n    os.rename('d/e/b.csv', 'c.csv')\n"
        "    with tempfile.TemporaryDirectory() as t: pathlib.Path(t, 'x').write_text('y')\n"
        "    pathlib.Path('touched').touch()\n    return sorted(os.listdir('.')), open('c.csv').read()",
        ["assert run() == (['a.csv', 'c.csv', 'd', 'touched'], '1,x\\n')"],
    ),
    "asynchronous": (
        "import asyncio\nasync def double(n):\n    await asyncio.sleep(0.001)\n    return 2 * n\n"
        "def run(l):\n    async def all_of(): return await asyncio.gather(*map(double, l))\n"
        "    return asyncio.run(all_of())",
        ["assert run([1, 2]) == [2, 4]"],
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nimport threading, queue\ndef run(l):\n"
        "    with ThreadPoolExecutor(4) as pool: return list(pool.map(lambda n: n + 1, l))",
        ["assert run([1, 2, 3]) == [2, 3, 4]"],
    ),
    "randomness": (
        "import random\ndef run():\n    random.seed(1)\n    return random.randint(1, 100)",
        ["assert run() == 18"],
    ),
    "prints_too": (
        "import sys\ndef run(n):\n    print('working', n)\n    print('!', file=sys.stderr)\n    return n",
        ["assert run(1) == 1"],
    ),
    "own_names_of_builtins": (
        "def list_of(n): return [n]\nsum = max = None\ndef isinstance(*a): return 7",
        ["assert list_of(1) == [1]", "assert isinstance(1, 2) == 7"],
    ),
    "main_guard": ("def f(): return 1\nif __name__ == '__main__':\n    raise ValueError", ["assert f() == 1"]),
    "function_as_argument": (
        "def keep(f, l): return [x for x in l if f(x)]",
        ["assert keep(lambda x: x > 1, [1, 2]) == [2]"],
    ),
    "time_limit_of_its_own": (
        "import signal\ndef run():\n    signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "    signal.pause()\n    return 1",
        ["assert run() == 1"],
    ),
    "catches_everything": ("def run():\n    try: 1 / 0\n    except: return 'caught'", ["assert run() == 'caught'"]),
    "time_zone": (
        "from datetime import datetime, timezone, timedelta\n"
        "def run(): return datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=2))).isoformat()",
        ["assert run() == '2024-01-01T00:00:00+02:00'"],
    ),
    "input_lines": (
        "n = int(input())\nprint(sum(int(input()) for _ in range(n)))",
        [{"input": "2\n3\n4\n", "output": "7\n"}, {"input": "0\n", "output": "0"}],
    ),
    "standard_input_at_once": (
        "import sys\ndef main():\n    data = sys.stdin.read().split()\n"
        "    for word in sorted(data): print(word, end=' ')\n    print()\n"
        "if __name__ == '__main__':\n    main()",
        [{"input": "b a\nc", "output": "a b c\n"}],
    ),
    "buffered_input": (
        "import sys, io, os\ninput = sys.stdin.buffer.readline\nn = int(input())\n"
        "sys.stdout.write(str(n * 2))\nsys.exit(0)",
        [{"input": "21\n", "output": "42"}],
    ),
    "input_by_descriptor": ("import os\nprint(len(os.read(0, 1000)))", [{"input": "é\n", "output": "3"}]),
    "end_of_input": (
        "total = 0\ntry:\n    while True: total += int(input())\nexcept EOFError:\n    print(total)",
        [{"input": "1\n2\n3", "output": "6"}],
    ),
    "thread_that_prints": (
        "import threading\nthreading.Thread(target=lambda: print(input().upper())).start()",
        [{"input": "abc\n", "output": "ABC"}],
    ),
    "much_output": ("for n in range(100000): print(n)", [{"input": "", "output": "\n".join(map(str, range(100000)))}]),
    "much_input": ("import sys\nprint(len(sys.stdin.read()))", [{"input": "x" * 10**6, "output": "1000000"}]),
}

WRONG: dict[str, tuple[str, list]] = {
    "off_by_one": ("def square(n): return n * n + 1", ["assert square(3) == 9"]),
    "right_for_one_test": ("def square(n): return 9", ["assert square(3) == 9", "assert square(2) == 4"]),
    "raises": ("def square(n): return n / 0", ["assert square(3) == 9"]),
    "no_python": ("Sure! Here is the function you asked for.", ["assert square(3) == 9"]),
    "another_name": ("def cube(n): return n ** 3", ["assert square(3) == 9"]),
    "empty": ("", ["assert square(3) == 9"]),
    "almost": ("def third(): return 0.3333", ["assert abs(third() - 0.333333333) < 1e-6"]),
    "wrong_output": ("print(int(input()) + 1)", [{"input": "1\n", "output": "3\n"}]),
    "missing_line": ("print(1)", [{"input": "", "output": "1\n2\n"}]),
    "endless": ("def square(n):\n    while True: pass", ["assert square(3) == 9"]),
}
