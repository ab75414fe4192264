"""What both backends speak: a chat request, its streamed answer, and conversations.

- `plain_data.py`: values that can be sent as JSON.
- `messages.py`: the messages of a request, checked.
- `option_checks.py`: the options of a request, checked.
- `chat_templates.py`: what a chat template says about its model.
- `options.py`: the same options as types, for editors.
- `tool_choice.py`: which tools a model may or must call.
- `docstrings.py`: what a docstring says about a function and its arguments.
- `tools.py`: Python functions as tools: what a model reads about them, and its calls, checked.
- `raw_prompt.py`: a text that a model continues without a chat template.
- `request.py`: one request, checked.
- `context_window.py`: which messages fit the context.
- `chunk.py`: a chunk of a streamed answer, and the marks that this package adds.
- `completion.py`: the whole answer.
- `completion_view.py`: how an answer is shown.
- `tool_steps.py`: the calls of functions in an answer, as messages and as lines.
- `confirming.py`: whether a call may be made: the user is asked.
- `conversation_view.py`: how a conversation is shown.
- `conversation.py`: one conversation, and its file.
- `kept.py`: conversations of notebooks, kept for the next kernel.
- `journal.py`: the journal of answers, kept while they stream.
- `journal_state.py`: what continues an answer, as the journal keeps it.
- `journaling.py`: answers on their way into the journal.
- `conversations.py`: all conversations by name, and the next question in one.
"""
