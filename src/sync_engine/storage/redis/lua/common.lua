-- What the scripts share: keys, stamps, the heads of stored values, the sweep of expired members.
-- ARGV[1]: key prefix. ARGV[2]: '1' where the server has RedisJSON. Times are epoch milliseconds.
-- A stamp is decimal text without leading zeros: as a double it would lose its last digits.
--
-- Every script reads each key that it may write before its first write: on a slot of a cluster that is moving, or where
-- a key of ours holds something else, it then fails with nothing done.

local call, try, find = redis.call, redis.pcall, string.match
local prefix, has_json = ARGV[1], ARGV[2] == '1'
local own = prefix .. '__local__:'
local ids_index, state_index = own .. 'ids', own .. 'by_state' -- sorted sets of equal scores: ordered by bytes
local expiring = own .. 'expiring'
local indexed = own .. 'indexed'
local tombs = own .. 'tomb:'
local any_tombs = own .. 'tombs' -- lives as long as the youngest tombstone: without it there is none

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
  local changed = 0
  for start = 1, #members, MEMBERS_MAX do
    changed = changed + call(command, key, unpack(members, start, math.min(start + MEMBERS_MAX - 1, #members)))
  end
  return changed
end

local function holds(key, kind)
  local found = call('TYPE', key).ok
  return found == kind or found == 'none'
end

local function push(lists, name, member)
  local list = lists[name]
  if list then list[#list + 1] = member else lists[name] = { member } end
end

local INDEXES = { { 'i', ids_index }, { 's', state_index }, { 'e', expiring } }

-- Why nothing can be kept here, or nil.
local function layout_refusal()
  for _, index in ipairs(INDEXES) do
    if not holds(index[2], 'zset') then return 'ERR the key ' .. index[2] .. ' holds something that is not its index' end
  end
end

-- A letter for each index that holds anything. `indexed` keeps what that was when a script last changed it, so that an
-- index which somebody else took away (the server itself, where it evicts) is missed.
local function present()
  local letters = ''
  for _, index in ipairs(INDEXES) do
    if call('EXISTS', index[2]) == 1 then letters = letters .. index[1] end
  end
  return letters
end

-- Whether the indexes name every item. To be asked before the first write of a call that may change them.
local function is_whole()
  return call('GET', indexed) == present()
end

-- After the last write of such a call. `whole`: whether they did before it.
local function note_indexes(whole)
  if not whole then
    call('DEL', indexed)
  else
    local letters = present()
    if letters ~= call('GET', indexed) then call('SET', indexed, letters) end
  end
end

local seen = {}
local function is_set(state)
  if seen[state] == nil then seen[state] = holds(set_of(state), 'set') end
  return seen[state]
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
    if stamp and width and #head >= 25 + width then return BINARY, stamp, string.sub(head, 26, 25 + width) end
    return LOOSE, '0', 'default' -- nobody else writes our magic: it is damaged, and gives way to whatever is written
  end
  if string.sub(head, 1, #TEXT_HEAD) == TEXT_HEAD then
    local length, state, stamp = tail_of(call('GETRANGE', key, -TEXT_TAIL, -1))
    if length then return TEXT, stamp or '0', state end
  end
  if find(head, '^%s*[{%[]') then return loose_head(key) end
  return FOREIGN
end

-- Form, stamp and state of what is stored at each key; no form where nothing is. The fourth list: whether it is surely
-- ours, whose index entries were written with it.
local function heads(keys)
  local forms, stamps, states, ours = {}, {}, {}, {}
  if call('EXISTS', unpack(keys)) == 0 then return forms, stamps, states, ours end
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
        forms[i], stamps[i], states[i], ours[i] = DOCUMENT, stamp, state, true
      else
        forms[i], stamps[i], states[i] = odd_document_head(key, said)
      end
    else
      forms[i], stamps[i], states[i] = string_head(key)
      ours[i] = forms[i] == BINARY
    end
  end
  return forms, stamps, states, ours
end

-- A member of `expiring` is a state, NUL, an id; its score is the deadline of the value. What is due is read first and
-- written later (`sweep_out`), so that a caller can read what else it needs in between.
local function due_now(now, most)
  local limit = string.format('%.0f', now) -- inclusive: Redis 8 lets a key go in the very millisecond of its deadline
  local due = call('ZRANGE', expiring, '-inf', limit, 'BYSCORE', 'LIMIT', 0, most)
  local found = { more = #due == most, done = {}, later = {}, left = {}, leaving = {}, gone = {}, whole = is_whole() }
  local keys, members, deadlines = {}, {}, {}
  local function leave(state, id, member)
    found.left[#found.left + 1] = member
    if is_set(state) then push(found.leaving, state, id) end
  end
  for _, member in ipairs(due) do
    local state, id = find(member, '^(%Z*)%z(.+)$')
    if not state then
      found.done[#found.done + 1] = member -- nobody's
    else
      local key = prefix .. id
      local deadline = call('PEXPIRETIME', key)
      if deadline == -1 or deadline > now then
        keys[#keys + 1], members[#members + 1], deadlines[#deadlines + 1] = key, member, deadline
      else
        found.done[#found.done + 1] = member
        found.gone[#found.gone + 1] = id
        leave(state, id, member)
      end
    end
  end
  if #keys > 0 then -- written anew since, or somebody else changed the deadline
    local forms, _, states = heads(keys)
    for i, key in ipairs(keys) do
      local state, id = find(members[i], '^(%Z*)%z(.+)$')
      local item = forms[i] and forms[i] ~= FOREIGN
      if item and states[i] == state and deadlines[i] > now then
        found.later[#found.later + 1] = deadlines[i]
        found.later[#found.later + 1] = members[i]
      else
        found.done[#found.done + 1] = members[i]
        if not item then found.gone[#found.gone + 1] = id end
        if not item or states[i] ~= state then leave(state, id, members[i]) end
      end
    end
  end
  return found
end

local function sweep_out(found)
  each_page('ZREM', expiring, found.done)
  each_page('ZADD', expiring, found.later)
  each_page('ZREM', ids_index, found.gone)
  each_page('ZREM', state_index, found.left)
  for state, ids in pairs(found.leaving) do each_page('SREM', set_of(state), ids) end
  if #found.done > 0 then note_indexes(found.whole) end
end

-- One bounded step for scripts that answer questions: whether there is more to do before the answer is right.
local function sweep(most)
  local found = due_now(now_ms(), most)
  if #found.done + #found.later == 0 then return false end
  local refusal = layout_refusal()
  if refusal then error({ err = refusal }) end
  sweep_out(found)
  return found.more
end
