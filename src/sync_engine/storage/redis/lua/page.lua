-- One page of an index, in order, with the values or without, in one step.
-- KEYS[1]: the index. ARGV[3], [4]: the range. ARGV[5]: how many entries at most. ARGV[6]: how many bytes stand before
-- the id in an entry. ARGV[7]: after how many bytes of values the page ends; '' for ids alone.
-- Answer: 0 to be asked again, 1 for a place that is not indexed, else a list:
--   the ids; 1 if there may be more behind them, else 0; then
--   without values: the ids among them whose key is not there;
--   with values: the documents (nil where there is none), the strings of the ids that have no document, in order.

local wait = not_yet()
if wait then return wait end

local count, skip = tonumber(ARGV[5]), tonumber(ARGV[6])
local ids = call('ZRANGE', KEYS[1], ARGV[3], ARGV[4], 'BYLEX', 'LIMIT', 0, count)
local more = #ids == count and 1 or 0
local keys = {}
for i, member in ipairs(ids) do
  if skip > 0 then
    member = string.sub(member, skip + 1)
    ids[i] = member
  end
  keys[i] = prefix .. member
end
if #ids == 0 then return { ids, 0, {}, {} } end

if ARGV[7] == '' then
  local missing = {}
  if call('EXISTS', unpack(keys)) < #keys then
    for i, key in ipairs(keys) do
      if call('EXISTS', key) == 0 then missing[#missing + 1] = ids[i] end
    end
  end
  return { ids, more, missing }
end

-- Values are read a few at a time, as many as the largest yet leaves room for. Nobody knows how large the next are: so
-- few that a page of small ones costs hardly more than in one step, and that one of large ones is not much too large.
local STEP_MAX = 16
local bytes_max = tonumber(ARGV[7])
local documents, strings = {}, {}
local read, bytes, largest, step = 0, 0, 1, 4
while read < #keys and (read == 0 or bytes < bytes_max) do
  step = math.max(1, math.min(step, math.floor((bytes_max - bytes) / largest), #keys - read))
  local rest = {}
  if has_json then
    local asked = { unpack(keys, read + 1, read + step) }
    asked[step + 1] = '.'
    local found = call('JSON.MGET', unpack(asked))
    for i = 1, step do
      local document = found[i]
      documents[read + i] = document
      if document then
        bytes = bytes + #document
        if #document > largest then largest = #document end
      else
        rest[#rest + 1] = keys[read + i]
      end
    end
  else
    rest = { unpack(keys, read + 1, read + step) }
  end
  if #rest > 0 then
    for _, value in ipairs(call('MGET', unpack(rest))) do
      strings[#strings + 1] = value
      if value then
        bytes = bytes + #value
        if #value > largest then largest = #value end
      end
    end
  end
  read = read + step
  step = math.min(step * 2, STEP_MAX)
end
if read < #ids then
  more = 1
  for i = #ids, read + 1, -1 do ids[i] = nil end
end
return { ids, more, documents, strings }
