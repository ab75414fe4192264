"""Answers that survive their engine: streamed from one llama-server, continued on another when that one dies.

An `Answer` holds all that another engine needs to continue. It sends nothing itself: it says what to send
(`request`) and reads the events that come back (`translate`). There are two kinds, and one that wraps either:

* `RawAnswer` streams token ids from `/completion`. Another engine gets the ids of the prompt and of the tokens
  generated so far, and continues: no token is lost or repeated. It computes these tokens in one batch, though, and
  a batch rounds otherwise than token by token, so where two tokens are nearly equally likely, a real model may go
  another way after the cut. With exact recovery the other engine generates the whole answer again, token by token;
  what it repeats is not shown a second time. If it writes something else, the answer continues from the ids.
* `ChatAnswer` streams from `/v1/chat/completions`, whose parser knows tool calls, images and the reasoning markup
  of every template, but which takes no ids. Another engine gets the whole question again, and text that it repeats
  is not shown a second time. If it writes something else, the answer cannot continue.
* `FittingAnswer` first drops the oldest turns that do not fit the context, then is one of the two above.

Text that was sent to the reader is never taken back, sent twice or lost. A raw answer continues after the last
token whose text was sent, so text that the engine held back (it may begin a stop string) is generated again. The
stream leaves out the ids of tokens that end within a character; they are found by tokenising the text of that
character. Where that cannot be trusted, and where an answer may have ended with the last event received, the
tokens of that text are generated again and not shown again (temperature 0), or taken from the tokenised text
(sampling).

Seeds: an answer without a seed draws one when it is made. The first engine uses the seed unchanged; one that
continues after n tokens uses (seed + n) modulo 2**31. So sampling continues with the same settings and a new
random sequence, which is the same whenever the answer is cut at the same token. Temperature 0 needs no seed.

Source: llama.cpp's `tools/server/server-context.cpp` (process_token, send_partial_response),
`common/sampling.cpp`.

Files, in reading order:

* `kinds.py`: which kind suits a question.
* `base.py`: `Answer`, and what all kinds share.
* `raw.py`: answers as token ids.
* `chat.py`: answers through the chat parser.
* `fitting.py`: answers without the oldest turns.
* `protocol.py`: between Ollama's chat shape and llama-server's, and the requests that llama-server refuses.
* `drafts.py`: what drafts brought in an answer.
* `logprobs.py`: log probabilities of tokens, in Ollama's shape.
* `prompts.py`: prompts foreseen from earlier ones.
* `tokens.py`: tokens and the text they spell, from the engine's tokenizer.
"""
