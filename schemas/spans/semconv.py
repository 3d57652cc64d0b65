"""Names of span attributes: OpenTelemetry's GenAI conventions and our own, in one place."""

from typing import Final

# What a span is (``Span.kind`` and the Kafka header).
LLM: Final = "llm"
TOOL: Final = "tool"
AGENT: Final = "agent"
CHAIN: Final = "chain"
REWARD: Final = "reward"
ALERT: Final = "alert"
SPAN: Final = "span"

# Who wrote a span (``Span.source``).
SOURCE_AGENT: Final = "agent"
SOURCE_PROXY: Final = "proxy"
SOURCE_OTLP: Final = "otlp"  # the agent's, too: a process of its own that exports to the gateway
COUNTED_SOURCES: Final = (SOURCE_AGENT, SOURCE_PROXY)  # the terminal event says how many spans these have written

# OpenTelemetry semantic conventions for generative AI.
OPERATION: Final = "gen_ai.operation.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
AGENT_NAME: Final = "gen_ai.agent.name"
WORKFLOW_NAME: Final = "gen_ai.workflow.name"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_RESULT: Final = "gen_ai.tool.call.result"
EVALUATION_NAME: Final = "gen_ai.evaluation.name"
EVALUATION_SCORE: Final = "gen_ai.evaluation.score.value"
ERROR_TYPE: Final = "error.type"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACK: Final = "exception.stacktrace"

# Ours: a span that has this is of kind "alert".
ALERT_NAME: Final = "millstream.alert"
# Ours: the exact OpenAI messages of a call, as JSON, in the proxy's spans.
REQUEST_MESSAGES: Final = "millstream.request.messages"
RESPONSE_MESSAGE: Final = "millstream.response.message"
# Ours: what an exported span belongs to.
ROLLOUT_ID: Final = "millstream.rollout_id"
ATTEMPT_ID: Final = "millstream.attempt_id"
MODEL_VERSION: Final = "millstream.model_version"
# Ours, of an answer that spans a weight update: which weights made which tokens (`schemas.wire.versions`).
RESPONSE_VERSIONS: Final = "millstream.response_versions"
# Ours, in the proxy's spans: who answered, from the cache perhaps; how often another replica has continued what one had
# begun; the resources version of the attempt; why the tokens can't be learnt from.
UPSTREAM: Final = "millstream.upstream"
CACHED: Final = "millstream.cached"
CONTINUED: Final = "millstream.continued"
RESOURCES_ID: Final = "millstream.resources_id"
UNTRAINABLE: Final = "millstream.untrainable"
# Ours: a call that is not the agent's own work, such as a judge's, and what it was for; how a client says so.
ASIDE: Final = "millstream.aside"
ASIDE_HEADER: Final = "x-millstream-aside"
# Ours: the response id of the call that a reward is given to by name.
REWARD_FOR: Final = "millstream.reward.for_call"

# Ours, of an attempt's root span: an event for each line that its code has printed; how many earlier ones are missing.
PRINTED: Final = "millstream.printed"
PRINTED_STREAM: Final = "stream"
PRINTED_TEXT: Final = "text"
PRINTED_LEFT_OUT: Final = "millstream.printed.left_out"

# Agent Lightning's reward attributes, so that its tools read our traces.
AGL_REWARD_NAME: Final = "agentlightning.reward.0.name"
AGL_REWARD_VALUE: Final = "agentlightning.reward.0.value"
AGL_SECOND_REWARD: Final = "agentlightning.reward.1.value"  # a reward of several dimensions

# Agent Lightning's names for what else agents emit: names of spans, and of their attributes.
AGL_MESSAGE: Final = "agentlightning.message"
AGL_MESSAGE_BODY: Final = "agentlightning.message.body"
AGL_OBJECT: Final = "agentlightning.object"
AGL_OBJECT_TYPE: Final = "agentlightning.object.type"
AGL_OBJECT_JSON: Final = "agentlightning.object.json"
AGL_EXCEPTION: Final = "agentlightning.exception"
AGL_ANNOTATION: Final = "agentlightning.annotation"
AGL_OPERATION_NAME: Final = "agentlightning.operation.name"
AGL_OPERATION_INPUT: Final = "agentlightning.operation.input"
AGL_OPERATION_OUTPUT: Final = "agentlightning.operation.output"

# ``gen_ai.operation.name`` → `Span.kind`.
KIND_OF_OPERATION: Final = {
    "chat": LLM,
    "text_completion": LLM,
    "generate_content": LLM,
    "execute_tool": TOOL,
    "invoke_agent": AGENT,
    "create_agent": AGENT,
    "invoke_workflow": CHAIN,
    "evaluation": REWARD,
}
