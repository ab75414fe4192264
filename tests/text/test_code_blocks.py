"""The code blocks of an answer: strings that know their language."""

from __future__ import annotations

import pickle

from sollol_nb.chat.completion import Completion
from sollol_nb.text.code_blocks import CodeBlock, code_blocks

TEXT = """Use this:

```Python title="a.py"
for i in range(3):
    print(i)
```

1. In a shell:

   ~~~bash
   ls
     -l
   ~~~

```
plain
```

```js
```

`x = 1` is no block.

```sql
SELECT 1"""


def test_blocks_come_in_order_with_their_languages_and_without_indentation() -> None:
    blocks = code_blocks(TEXT)
    assert blocks == ["for i in range(3):\n    print(i)", "ls\n  -l", "plain", "SELECT 1"]
    assert [block.language for block in blocks] == ["python", "bash", "", "sql"]


def test_an_answer_gives_its_code_blocks() -> None:
    assert Completion(message={"content": TEXT}).code == code_blocks(TEXT)
    assert Completion(message={"content": "none"}).code == []


def test_a_block_is_a_string_that_can_be_pickled() -> None:
    block = pickle.loads(pickle.dumps(CodeBlock("x = 1", "python")))
    assert (block, block.language, isinstance(block, str)) == ("x = 1", "python", True)
    assert "\n\n".join([block, block]) == "x = 1\n\nx = 1"
