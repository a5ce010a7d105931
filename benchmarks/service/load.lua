-- One of the bodies in a folder for each request, in turn. Arguments: folder, number of bodies, length of the JSON head
-- of a binary body, or 0.
local requests, number = {}, 0

function init(arguments)
  local headers = { ["Content-Type"] = "application/json" }
  if arguments[3] ~= "0" then
    headers = {
      ["Content-Type"] = "application/octet-stream",
      ["Inference-Header-Content-Length"] = arguments[3],
    }
  end
  for i = 1, tonumber(arguments[2]) do
    local file = assert(io.open(arguments[1] .. "/" .. i, "rb"))
    requests[i] = wrk.format("POST", nil, headers, file:read("*all"))
    file:close()
  end
end

function request()
  number = number % #requests + 1
  return requests[number]
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "failed": %d, "p50": %.4f, "p95": %.4f, "p99": %.4f}\n',
    summary.requests, summary.duration / 1e6, failed,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3))
end
