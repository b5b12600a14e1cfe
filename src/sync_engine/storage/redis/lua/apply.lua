-- Apply operations, at most one per key, in one atomic step. KEYS: the items' keys, in the order of the operations.
-- ARGV[3]: how long a tombstone lives, ms. Then groups: kind, state, extra, count, and for each of its keys a stamp
-- and, for what is written, the value:
--   J / S  write a document / a string in the state; extra: deadline or ''
--   j / s  the same as a fill: never past a copy or tombstone of its own stamp or later
--   U / V  as J / S, but only over an older copy, whose deadline stays: a restate that brings the whole item
--   D      delete; state: only what is in this state ('' for any)
--   R      change the state; extra: only what is in this state ('' for any)
-- Answer, flat, for the exceptions only: index from 0, then 'superseded', 'done' (a delete or restate that changed
-- something) or the reason of a refusal. Everything that can be refused is checked before its first write.

local tomb_ms = ARGV[3]
local now = now_ms()
sweep(now)

local forms, stamps, states = heads(KEYS)
local tracked = call('EXISTS', expiring) == 1
local buried = {}
if call('EXISTS', any_tombs) == 1 then
  local keys = {}
  for i, key in ipairs(KEYS) do keys[i] = tombs .. id_of(key) end
  buried = call('MGET', unpack(keys))
end

local answer = {}
local leaving, entering, gone, due = {}, {}, {}, {}

local function say(i, what)
  answer[#answer + 1] = i - 1
  answer[#answer + 1] = what
end

local function push(lists, state, id)
  local list = lists[state]
  if list then list[#list + 1] = id else lists[state] = { id } end
end

local function leave(i, id)
  push(leaving, states[i], id)
  if tracked then gone[#gone + 1] = member_of(states[i], id) end
end

local function enter(state, id, deadline)
  push(entering, state, id)
  if deadline then
    due[#due + 1] = deadline
    due[#due + 1] = member_of(state, id)
  end
end

local function superseded(i, stamp, fill)
  local held, tomb = forms[i] and stamps[i], buried[i]
  if fill then
    if stamp == '0' then return held or tomb end
    return (held and not older(held, stamp)) or (tomb and not older(tomb, stamp))
  end
  return stamp ~= '0' and ((held and older(stamp, held)) or (tomb and older(stamp, tomb)))
end

local function bury(id, stamp)
  call('SET', tombs .. id, stamp, 'PX', tomb_ms)
  call('SET', any_tombs, '', 'PX', tomb_ms)
end

local function remove(i, key, stamp)
  local id = id_of(key)
  if forms[i] then
    call('UNLINK', key)
    leave(i, id)
  end
  if stamp ~= '0' then
    bury(id, stamp)
  elseif buried[i] then
    call('DEL', tombs .. id)
  end
end

local function write_document(form, key, value, deadline)
  if form and form ~= DOCUMENT then
    -- JSON.SET refuses a string's key: write beside it and move, so that a refusal leaves the old value standing.
    local aside = prefix .. '__local__:aside'
    call('DEL', aside)
    local said = try('JSON.SET', aside, '$', value)
    if said.err then return said.err end
    call('RENAME', aside, key)
  else
    local said = try('JSON.SET', key, '$', value)
    if said.err then return said.err end
  end
  if deadline then
    call('PEXPIREAT', key, deadline)
  elseif form == DOCUMENT then
    call('PERSIST', key) -- JSON.SET keeps an old deadline
  end
end

local function write_string(key, value, deadline)
  if deadline then return try('SET', key, value, 'PXAT', deadline).err end
  return try('SET', key, value).err
end

local function stamped(value, stamp, state)
  return ENVELOPE .. string.rep('0', 20 - #stamp) .. stamp .. string.format('%03d', #state) .. state
    .. string.sub(value, 26 + tonumber(string.sub(value, 23, 25)))
end

local function retold(value, stamp, state)
  local length, _, _, expires_at = tail_of(value)
  local tail = '"state":' .. cjson.encode(state)
  if stamp ~= '0' then tail = tail .. ',"stamp":' .. stamp end
  if expires_at then tail = tail .. ',"expires_at":' .. expires_at end
  return string.sub(value, 1, #value - length) .. tail .. '}'
end

local function restate(i, key, stamp, state)
  local form, newest = forms[i], stamp
  if stamp == '0' then newest = stamps[i] end
  if form == LOOSE then return say(i, 'the state of this form of text cannot be changed in place') end
  if form == DOCUMENT then
    call('JSON.SET', key, '$.state', cjson.encode(state))
    if stamp ~= '0' then call('JSON.SET', key, '$.stamp', stamp) end
  elseif form == BINARY then
    call('SET', key, stamped(call('GET', key), newest, state), 'KEEPTTL')
  else
    call('SET', key, retold(call('GET', key), newest, state), 'KEEPTTL')
  end
  local id, deadline = id_of(key), call('PEXPIRETIME', key)
  leave(i, id)
  enter(state, id, deadline > 0 and deadline)
  say(i, 'done')
end

local checked = {}
local function is_set(state)
  if checked[state] == nil then
    local kind = call('TYPE', set_of(state)).ok
    checked[state] = kind == 'set' or kind == 'none'
  end
  return checked[state]
end

-- Each takes the number of an operation and the place of its stamp in ARGV, and answers with the next place.

local function delete(i, at, only_in)
  local key, stamp, form = KEYS[i], ARGV[at], forms[i]
  if only_in ~= '' and (form == nil or states[i] ~= only_in) then
    push(leaving, only_in, id_of(key)) -- a stale member
  elseif form == FOREIGN then
    say(i, 'the key holds something that is not an item')
  elseif superseded(i, stamp) then
    say(i, 'superseded')
  else
    if form then say(i, 'done') end
    remove(i, key, stamp)
  end
  return at + 1
end

local function change(i, at, state, only_in)
  local key, stamp, form = KEYS[i], ARGV[at], forms[i]
  if form == FOREIGN then
    say(i, 'the key holds something that is not an item')
  elseif form and (only_in == '' or states[i] == only_in) then
    if stamp ~= '0' and older(stamp, stamps[i]) then
      say(i, 'superseded')
    elseif stamp == '0' or stamp ~= stamps[i] then
      restate(i, key, stamp, state)
    end
  end
  return at + 1
end

local function put(i, at, state, document, fill, deadline, late)
  local key, stamp, form = KEYS[i], ARGV[at], forms[i]
  if form == FOREIGN then
    say(i, 'the key holds something that is not an item')
  elseif (form or buried[i]) and superseded(i, stamp, fill) then
    say(i, 'superseded')
  elseif late then
    if not fill then remove(i, key, stamp) end
  else
    local refusal
    if document then
      refusal = write_document(form, key, ARGV[at + 1], deadline)
    else
      refusal = write_string(key, ARGV[at + 1], deadline)
    end
    if refusal then
      say(i, refusal)
    else
      local id = id_of(key)
      if form then
        if tracked then gone[#gone + 1] = member_of(states[i], id) end
        if states[i] ~= state then push(leaving, states[i], id) end
      end
      enter(state, id, deadline)
    end
  end
  return at + 2
end

-- The stamp just below: '1200' to '1199'.
local function below(stamp)
  local head, digit, zeros = find(stamp, '^(%d-)([1-9])(0*)$')
  return (string.gsub(head .. digit - 1 .. string.rep('9', #zeros), '^0+(%d)', '%1'))
end

-- A restate that brings the whole item: over an older copy alone, whose deadline stays. Where there is none, what is
-- older than it must stay out, and what a read brings of it may come.
local function put_over(i, at, state, document)
  if not forms[i] then
    local before = below(ARGV[at])
    if not buried[i] or older(buried[i], before) then bury(id_of(KEYS[i]), before) end
    return at + 2
  end
  local held = redis.call('PEXPIRETIME', KEYS[i])
  return put(i, at, state, document, false, held > 0 and string.format('%.0f', held), false)
end

local i, at = 0, 4
while at <= #ARGV do
  local kind, state, extra, count = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local document, fill = kind == 'J' or kind == 'j' or kind == 'U', kind == 'j' or kind == 's'
  local over = kind == 'U' or kind == 'V'
  local deadline = kind ~= 'R' and extra ~= '' and extra
  local late = deadline and tonumber(deadline) <= now
  local usable = kind == 'D' or is_set(state)
  at = at + 4
  for n = i + 1, i + count do
    if kind == 'D' then
      at = delete(n, at, state)
    elseif not usable then
      say(n, 'the key of its state holds something that is not a set')
      at = at + (kind == 'R' and 1 or 2)
    elseif kind == 'R' then
      at = change(n, at, state, extra)
    elseif over then
      at = put_over(n, at, state, document)
    else
      at = put(n, at, state, document, fill, deadline, late)
    end
  end
  i = i + count
end

-- Leaving comes first: a restate may leave and enter the same set.
for state, ids in pairs(leaving) do
  if is_set(state) then each_page('SREM', set_of(state), ids) end
end
if #gone > 0 then each_page('ZREM', expiring, gone) end
for state, ids in pairs(entering) do each_page('SADD', set_of(state), ids) end
if #due > 0 then each_page('ZADD', expiring, due) end
return answer
