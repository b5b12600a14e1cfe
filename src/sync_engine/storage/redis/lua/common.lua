-- What the scripts share: keys, stamps, the heads of stored values, the sweep of expired members.
-- ARGV[1]: key prefix. ARGV[2]: '1' where the server has RedisJSON. Times are epoch milliseconds.
-- A stamp is decimal text without leading zeros: as a double it would lose its last digits.

local call, try, find = redis.call, redis.pcall, string.match
local prefix, has_json = ARGV[1], ARGV[2] == '1'
local expiring = prefix .. '__local__:expiring'
local tombs = prefix .. '__local__:tomb:'
local any_tombs = prefix .. '__local__:tombs' -- lives as long as the youngest tombstone: without it there is none

local MEMBERS_MAX = 1000 -- arguments per call; Lua unpacks at most 7,999
local ENVELOPE = '\245\1'
local ENVELOPE_HEAD_END = 152 -- magic 2, stamp 20, state length 3, state up to 32 characters of 4 bytes
local TEXT_HEAD, TEXT_TAIL = '{"object_id":"', 512
local LOOSE_MAX = 16 * 1024 * 1024 -- bytes of a text in another key order that are worth a parse in here

local DOCUMENT, TEXT, LOOSE, BINARY, FOREIGN = 1, 2, 3, 4, 5

local function id_of(key) return string.sub(key, #prefix + 1) end
local function set_of(state) return prefix .. 'state:' .. state end
local function member_of(state, id) return state .. '\0' .. id end

local function older(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function each_page(command, key, members)
  for start = 1, #members, MEMBERS_MAX do
    call(command, key, unpack(members, start, math.min(start + MEMBERS_MAX - 1, #members)))
  end
end

-- A member of the expiring set is its state, NUL, its id; the score is the deadline of the value.
local function sweep(now)
  local limit = string.format('%.0f', now) -- inclusive: Redis 8 lets a key go in the very millisecond of its deadline
  repeat
    local due = call('ZRANGE', expiring, '-inf', limit, 'BYSCORE', 'LIMIT', 0, MEMBERS_MAX)
    for _, member in ipairs(due) do
      local state, id = find(member, '^(%Z*)%z(.*)$')
      local deadline = call('PEXPIRETIME', prefix .. id)
      if deadline > now then
        call('ZADD', expiring, deadline, member) -- somebody else prolonged it
      else
        call('ZREM', expiring, member)
        if deadline ~= -1 then try('SREM', set_of(state), id) end
      end
    end
  until #due < MEMBERS_MAX
end

local KEYS_OF_AN_ITEM = { 'version', 'timestamp', 'state', 'payload', 'payload_hash' }

-- A document without our stamp: the original's if it has all of its keys, else somebody else's.
local function original_head(key)
  local names = call('JSON.OBJKEYS', key, '$')[1]
  if not names then return FOREIGN end
  local has = {}
  for _, name in ipairs(names) do has[name] = true end
  for _, name in ipairs(KEYS_OF_AN_ITEM) do
    if not has[name] then return FOREIGN end
  end
  local state = cjson.decode(call('JSON.GET', key, '$.state'))[1]
  if type(state) ~= 'string' then return FOREIGN end
  return DOCUMENT, '0', state
end

local function odd_document_head(key, found)
  local stamp = find(found, '^%[(%d+),"')
  if stamp then return DOCUMENT, stamp, cjson.decode(found)[2] end
  return original_head(key)
end

local function loose_head(key)
  if call('STRLEN', key) > LOOSE_MAX then return FOREIGN end
  local valid, item = pcall(cjson.decode, call('GET', key))
  if not valid or type(item) ~= 'table' then return FOREIGN end
  local state = item.state or 'default'
  if #item == 14 then
    state = item[14]
  else
    for _, name in ipairs({ 'object_id', 'version', 'updated_at', 'priority_score', 'last_accessed', 'access_count', 'content' }) do
      if item[name] == nil then return FOREIGN end
    end
    if item.content_hash == nil and item.merkle_root == nil then return FOREIGN end
  end
  if type(state) ~= 'string' then return FOREIGN end
  return LOOSE, '0', state
end

-- The state is the last key that the original writes; only our own notes follow it. Quotes inside a value are
-- escaped, so the last `,"state":"` is the key itself.
local function tail_of(text)
  local tail = find(text, '^.*,("state":".*)$')
  if not tail then return end
  local valid, told = pcall(cjson.decode, '{' .. tail)
  if not valid or type(told.state) ~= 'string' then return end
  return #tail, told.state, find(tail, '"stamp":(%d+)'), find(tail, '"expires_at":(%d+)')
end

local function string_head(key)
  local head = try('GETRANGE', key, 0, ENVELOPE_HEAD_END)
  if type(head) == 'table' then return FOREIGN end
  if head == '' then
    if call('EXISTS', key) == 1 then return FOREIGN end
    return nil
  end
  if string.sub(head, 1, 2) == ENVELOPE then
    local stamp = find(string.sub(head, 3, 22), '^0*(%d+)$')
    local width = tonumber(find(string.sub(head, 23, 25), '^%d%d%d$'))
    if not stamp or not width or #head < 25 + width then return FOREIGN end
    return BINARY, stamp, string.sub(head, 26, 25 + width)
  end
  if string.sub(head, 1, #TEXT_HEAD) == TEXT_HEAD then
    local length, state, stamp = tail_of(call('GETRANGE', key, -TEXT_TAIL, -1))
    if length then return TEXT, stamp or '0', state end
  end
  if find(head, '^%s*[{%[]') then return loose_head(key) end
  return FOREIGN
end

-- Form, stamp and state of what is stored at each key; no form where nothing is.
local function heads(keys)
  local forms, stamps, states = {}, {}, {}
  if call('EXISTS', unpack(keys)) == 0 then return forms, stamps, states end
  local found = {}
  if has_json then
    local asked = { unpack(keys) }
    asked[#asked + 1] = '$["stamp","state"]'
    found = call('JSON.MGET', unpack(asked))
  end
  local last, stamp, state -- unordered items in one state all say the same
  for i, key in ipairs(keys) do
    local said = found[i]
    if said then
      if said ~= last then
        stamp, state = find(said, '^%[(%d+),"([^"\\]*)"%]$')
        last = said
      end
      if stamp then
        forms[i], stamps[i], states[i] = DOCUMENT, stamp, state
      else
        forms[i], stamps[i], states[i] = odd_document_head(key, said)
      end
    else
      forms[i], stamps[i], states[i] = string_head(key)
    end
  end
  return forms, stamps, states
end
