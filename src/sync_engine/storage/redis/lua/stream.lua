-- Appending to the change stream: shared by the script that changes items and the one that is given entries.
-- `numbers` is the hash of the writers' last numbers. An entry is told by the first and the last place of its fields
-- in ARGV; its writer and its number are put behind them.

-- Why nothing can be appended, or nil. To be asked before the first write of the call.
local function stream_refusal(stream, numbers, writer)
  local kind = redis.call('TYPE', stream).ok
  if kind ~= 'stream' and kind ~= 'none' then return 'the key of the change stream holds a ' .. kind end
  kind = redis.call('TYPE', numbers).ok
  if kind == 'none' then return end
  if kind ~= 'hash' then return 'the key of the change stream\'s numbers holds a ' .. kind end
  local last = redis.call('HGET', numbers, writer)
  -- Up to fifteen digits, since numbers are doubles in here.
  if last and (#last > 15 or not string.match(last, '^%d+$')) then
    return 'the last number of this writer of the change stream is not a number'
  end
end

-- Append one entry for each pair (first, last) of the flat list; answers with their ids.
local function append_entries(stream, numbers, writer, maxlen, places)
  local count = #places / 2
  if count == 0 then return {} end
  local number = redis.call('HINCRBY', numbers, writer, count) - count
  local ids = {}
  for n = 1, #places, 2 do
    number = number + 1
    local entry = { 'XADD', stream, 'MAXLEN', '~', maxlen, '*', unpack(ARGV, places[n], places[n + 1]) }
    local size = #entry
    entry[size + 1], entry[size + 2] = 'writer', writer
    entry[size + 3], entry[size + 4] = 'seq', string.format('%.0f', number)
    ids[#ids + 1] = redis.call(unpack(entry))
  end
  return ids
end
