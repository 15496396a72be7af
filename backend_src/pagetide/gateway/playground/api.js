// What the page asks of the gateway.

export function headers(key) {
  return key ? { "Content-Type": "application/json", Authorization: `Bearer ${key}` } : { "Content-Type": "application/json" };
}

export async function getJson(path, key) {
  const answer = await fetch(path, { headers: headers(key) });
  if (!answer.ok) throw new Error(await errorOf(answer));
  return answer.json();
}

async function errorOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered with status ${answer.status}`;
  }
}

// Calls onChunk with every chunk of a streamed chat. Throws an Error with the server's sentence.
export async function streamChat(body, key, signal, onChunk) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(body), signal,
  });
  if (!answer.ok) throw new Error(await errorOf(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      onChunk(chunk);
    }
  }
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function asCurl(body, origin, hasKey) {
  const key = hasKey ? ' \\\n  -H "Authorization: Bearer $PAGETIDE_API_KEY"' : "";
  return `curl -N ${origin}/v1/chat/completions \\\n  -H "Content-Type: application/json"${key} \\\n  -d ${quoted(JSON.stringify(body))}`;
}

const OWN = new Set([
  "model", "messages", "stream", "stream_options", "n", "temperature", "top_p", "max_tokens", "seed", "stop",
  "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
]);

// JSON is Python but for three words.
function asLiteral(value) {
  const text = JSON.stringify(value);
  return text.replace(/"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b/g,
    (word) => ({ true: "True", false: "False", null: "None" })[word] ?? word);
}

export function asPython(body, origin, hasKey) {
  const own = Object.entries(body).filter(([name]) => OWN.has(name) && name !== "stream_options");
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OWN.has(name)));
  const lines = own.map(([name, value]) => `    ${name}=${asLiteral(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${asLiteral(extra)},`);
  const key = hasKey ? 'os.environ["PAGETIDE_API_KEY"]' : '"none"';
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
stream = client.chat.completions.create(
${lines.join("\n")}
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
`;
}
