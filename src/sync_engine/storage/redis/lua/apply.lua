-- Apply operations, at most one per key, in one atomic step. KEYS: the items' keys, in the order of the operations.
-- ARGV[3]: how long a tombstone lives, ms. ARGV[4] to [7]: the change stream's key, or '' for none, the key of its
-- numbers, the name of its writer, about how many entries it keeps. ARGV[8]: how many groups follow. A group: kind,
-- state, extra, count, and for each of its keys a stamp and, for what is written, the value:
--   J / S  write a document / a string in the state; extra: deadline or ''
--   j / s  the same as a fill: never past a copy or tombstone of its own stamp or later
--   U / V  as J / S, but only over an older copy, whose deadline stays: a restate that brings the whole item
--   D      delete; state: only what is in this state ('' for any); extra: '1' for ids that an index told
--   R      change the state; extra: only what is in this state ('' for any)
--   E      evict: remove the copy if it has exactly this stamp, as if it had never been here; extra: '1' to keep out
--          what is older, as long as a delete would
--   F      forget an index entry that has no item any more; state: whose entry ('' where not known). No stamp, no value
-- With a change stream there follow, for each operation, how many arguments its entry has, and those.
-- Answer, flat, for the exceptions only: index from 0, then 'superseded', 'done' (a delete, restate or eviction that
-- changed something) or the reason of a refusal. Everything that can be refused is checked before its first write.

local tomb_ms, stream, numbers, writer, maxlen = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local SWEPT_MAX = 250 -- as many as a call can add, so that sweeping keeps up with writing
local FIRST_GROUP = 9
local WIDTHS = { D = 1, R = 1, E = 1, F = 0 } -- arguments per key; of the others two

local STATES_MAX, LOOKS_MAX = 1000, 10000 -- 1-3 ms of the server each

-- Every state that has an item, in order; nil where there are too many to ask for each.
local function all_states()
  local states, from = {}, '-'
  for _ = 1, STATES_MAX do
    local member = call('ZRANGE', state_index, from, '+', 'BYLEX', 'LIMIT', 0, 1)[1]
    if not member then return states end
    local state = find(member, '^(%Z*)%z')
    states[#states + 1] = state
    from = '(' .. (state and member_of(state, '\255') or member) -- or somebody else's
  end
end

-- Where the index by state has an entry of an id that it should not have: what somebody else took away, or replaced by
-- a value in another state, and what has expired and is not swept yet. `expected`: by place in `keys` the one state in
-- which an entry is right, or would be soon; those that have it have no other. Answer: states by place, nil where to
-- look would take too long; and by place whether the index of ids names it.
local function strayed(keys, ours, expected)
  local places, ids = {}, {}
  for i, key in ipairs(keys) do
    if not ours[i] then
      places[#places + 1] = i
      ids[#ids + 1] = id_of(key)
    end
  end
  local found, named, lost = {}, {}, {}
  if #ids == 0 then return found, named end
  local scores = call('ZMSCORE', ids_index, unpack(ids))
  for n, i in ipairs(places) do
    if scores[n] then
      named[i] = true
      local right = expected[i]
      if not (right and call('ZSCORE', state_index, member_of(right, ids[n]))) then lost[#lost + 1] = n end
    end
  end
  if #lost == 0 then return found, named end
  local states = all_states()
  if not states or #states * #lost > LOOKS_MAX then return nil, named end
  for _, n in ipairs(lost) do
    local members = {}
    for m, state in ipairs(states) do members[m] = member_of(state, ids[n]) end
    local held = #members > 0 and call('ZMSCORE', state_index, unpack(members)) or {}
    for m, state in ipairs(states) do
      if held[m] then push(found, places[n], state) end
    end
  end
  return found, named
end

-- Reads come first: see common.lua.

local now = now_ms()
local refusal = layout_refusal()
  or not holds(mark, 'hash') and 'ERR the key ' .. mark .. ' holds something that is not its mark'
if not refusal and stream ~= '' then
  refusal = stream_refusal(stream, numbers, writer)
  refusal = refusal and 'ERR ' .. refusal
end
if refusal then return redis.error_reply(refusal) end

local forms, stamps, states, ours = heads(KEYS)
local known = read_mark(now)
local newest = known.newest
local tracked = call('EXISTS', expiring) == 1
local buried = {}
call('EXISTS', own .. 'aside')
if call('EXISTS', any_tombs) == 1 then
  local keys = {}
  for i, key in ipairs(KEYS) do keys[i] = tombs .. id_of(key) end
  buried = call('MGET', unpack(keys))
end
local due = due_now(now, SWEPT_MAX)
local first_of_all = call('EXISTS', indexed) == 0 and try('DBSIZE') == 0
for i = 1, #KEYS do
  if states[i] then is_set(states[i]) end
end
local groups, at = {}, FIRST_GROUP
for n = 1, tonumber(ARGV[8]) do
  local kind, state, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 3])
  groups[n] = { kind = kind, state = state, extra = ARGV[at + 2], count = count, at = at + 4 }
  if state ~= '' then is_set(state) end
  at = at + 4 + count * (WIDTHS[kind] or 2)
end
local entries_at = at

local whole = due.whole
local expected, place = {}, 0
for _, group in ipairs(groups) do
  for i = place + 1, place + group.count do
    expected[i] = states[i] or (not WIDTHS[group.kind] and group.state)
  end
  place = place + group.count
end
local strays, named = strayed(KEYS, ours, expected)
if not strays then whole, strays = false, {} end
for _, found in pairs(strays) do
  for _, state in ipairs(found) do is_set(state) end
end

local answer, told = {}, {}
local changed = false
local leaving, entering, staying = {}, {}, {} -- ids by state: of the sets
local left, entered = {}, {} -- of the index by state
local gone, come = {}, {} -- of the index of ids
local ends, starts = {}, {} -- of what expires

local function say(i, what)
  answer[#answer + 1] = i - 1
  answer[#answer + 1] = what
end

-- The operation took effect here, or stands for something that did elsewhere.
local function applied(i, stamp, silent)
  changed = true
  told[i] = not silent
  if stamp ~= newest and older(newest, stamp) then newest = stamp end
end

local function leave(state, id)
  local member = member_of(state, id)
  push(leaving, state, id)
  left[#left + 1] = member
  if tracked then ends[#ends + 1] = member end
end

local function enter(state, id, deadline, is_new)
  local member = member_of(state, id)
  push(entering, state, id)
  entered[#entered + 1] = '0'
  entered[#entered + 1] = member
  if is_new then
    come[#come + 1] = '0'
    come[#come + 1] = id
  end
  if deadline then
    starts[#starts + 1] = deadline
    starts[#starts + 1] = member
  end
end

local function stay(state, id, deadline)
  push(staying, state, id)
  if deadline then
    starts[#starts + 1] = deadline
    starts[#starts + 1] = member_of(state, id)
  elseif tracked then
    ends[#ends + 1] = member_of(state, id)
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

local function take_out(i, key, id)
  gone[#gone + 1] = id
  if forms[i] then
    call('UNLINK', key)
    leave(states[i], id)
  end
end

local function remove(i, key, stamp)
  local id = id_of(key)
  take_out(i, key, id)
  if stamp ~= '0' then
    bury(id, stamp)
  elseif buried[i] then
    call('DEL', tombs .. id)
  end
end

local function write_document(form, key, value, deadline)
  if form and form ~= DOCUMENT then
    -- JSON.SET refuses a string's key: write beside it and move, so that a refusal leaves the old value standing.
    local aside = own .. 'aside'
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
  local form, newest_here = forms[i], stamp
  if stamp == '0' then newest_here = stamps[i] end
  if form == LOOSE then return say(i, 'the state of this form of text cannot be changed in place') end
  if form == DOCUMENT then
    call('JSON.SET', key, '$.state', cjson.encode(state))
    if stamp ~= '0' then call('JSON.SET', key, '$.stamp', stamp) end
  elseif form == BINARY then
    call('SET', key, stamped(call('GET', key), newest_here, state), 'KEEPTTL')
  else
    call('SET', key, retold(call('GET', key), newest_here, state), 'KEEPTTL')
  end
  local id, deadline = id_of(key), call('PEXPIRETIME', key)
  leave(states[i], id)
  enter(state, id, deadline > 0 and deadline, not ours[i])
  applied(i, stamp)
  say(i, 'done')
end

-- Each takes the number of an operation and the place of its stamp in ARGV.

local function delete(i, at, only_in, listed)
  local key, stamp, form = KEYS[i], ARGV[at], forms[i]
  if only_in ~= '' and (form == nil or states[i] ~= only_in) then -- a stale member
    leave(only_in, id_of(key))
    if form == nil or form == FOREIGN then gone[#gone + 1] = id_of(key) end
  elseif form == FOREIGN then
    if listed then gone[#gone + 1] = id_of(key) else say(i, 'the key holds something that is not an item') end
  elseif superseded(i, stamp) then
    say(i, 'superseded')
  else
    if form then say(i, 'done') end
    -- What is not here may have been in the truth, except to an unordered delete, which asks of nobody else.
    if form or stamp ~= '0' then applied(i, stamp) end
    remove(i, key, stamp)
  end
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
end

local function put(i, at, state, document, fill, deadline, late)
  local key, stamp, form = KEYS[i], ARGV[at], forms[i]
  if form == FOREIGN then return say(i, 'the key holds something that is not an item') end
  if (form or buried[i]) and superseded(i, stamp, fill) then return say(i, 'superseded') end
  if late then
    if not fill then
      remove(i, key, stamp)
      applied(i, stamp)
    end
    return
  end
  local said
  if document then
    said = write_document(form, key, ARGV[at + 1], deadline)
  else
    said = write_string(key, ARGV[at + 1], deadline)
  end
  if said then return say(i, said) end
  applied(i, stamp, fill)
  local id = id_of(key)
  if not form then
    if named[i] and tracked then ends[#ends + 1] = member_of(state, id) end
    enter(state, id, deadline, true)
  elseif ours[i] and states[i] == state then
    stay(state, id, deadline)
  else
    leave(states[i], id)
    enter(state, id, deadline, not ours[i])
  end
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
    local stamp = ARGV[at]
    local before = below(stamp)
    if not buried[i] or older(buried[i], before) then bury(id_of(KEYS[i]), before) end
    return not (buried[i] and older(stamp, buried[i])) and applied(i, stamp)
  end
  local held = call('PEXPIRETIME', KEYS[i])
  put(i, at, state, document, false, held > 0 and string.format('%.0f', held), false)
end

local function evict(i, at, with_tomb)
  if forms[i] and forms[i] ~= FOREIGN and stamps[i] == ARGV[at] then
    take_out(i, KEYS[i], id_of(KEYS[i]))
    -- What was on its way before it may still come; of its very own stamp it is welcome.
    local young = now - tonumber(stamps[i]) / 65536 < tonumber(tomb_ms)
    if with_tomb and stamps[i] ~= '0' and young then bury(id_of(KEYS[i]), below(stamps[i])) end
    say(i, 'done')
  end
end

local function forget(i, state)
  local id = id_of(KEYS[i])
  local item = forms[i] and forms[i] ~= FOREIGN
  if not item then gone[#gone + 1] = id end
  if state ~= '' and not (item and states[i] == state) then leave(state, id) end
end

-- Leaving comes first: a restate may leave and enter the same set.
local function settle()
  for state, ids in pairs(leaving) do
    if is_set(state) then each_page('SREM', set_of(state), ids) end
  end
  each_page('ZREM', state_index, left)
  each_page('ZREM', ids_index, gone)
  each_page('ZREM', expiring, ends)
  for state, ids in pairs(staying) do
    if each_page('SADD', set_of(state), ids) > 0 then -- somebody else took members away, and who knows what more
      for _, id in ipairs(ids) do enter(state, id, false, true) end
    end
  end
  for state, ids in pairs(entering) do each_page('SADD', set_of(state), ids) end
  each_page('ZADD', state_index, entered)
  each_page('ZADD', ids_index, come)
  each_page('ZADD', expiring, starts)
  note_indexes(whole or (first_of_all and changed))
  if not changed then return end
  call('HSET', mark, 'newest', newest, 'writes', string.format('%.0f', known.writes + 1), unpack(known.news))
end

local function all_groups()
  local i = 0
  for _, group in ipairs(groups) do
    local kind, state, extra = group.kind, group.state, group.extra
    local document, fill = kind == 'J' or kind == 'j' or kind == 'U', kind == 'j' or kind == 's'
    local deadline = WIDTHS[kind] == nil and extra ~= '' and extra
    local late = deadline and tonumber(deadline) <= now
    local width = WIDTHS[kind] or 2
    local place = group.at
    for n = i + 1, i + group.count do
      if kind == 'D' then
        delete(n, place, state, extra ~= '')
      elseif kind == 'E' then
        evict(n, place, extra ~= '')
      elseif kind == 'F' then
        forget(n, state)
      elseif not is_set(state) then
        say(n, 'the key of its state holds something that is not a set')
      elseif kind == 'R' then
        change(n, place, state, extra)
      elseif kind == 'U' or kind == 'V' then
        put_over(n, place, state, document)
      else
        put(n, place, state, document, fill, deadline, late)
      end
      place = place + width
    end
    i = i + group.count
  end
end

sweep_out(due)
for i, found in pairs(strays) do
  for _, state in ipairs(found) do
    if state ~= states[i] then leave(state, id_of(KEYS[i])) end
  end
end
local well, failed = pcall(all_groups)
settle()
if stream ~= '' then
  local places, place = {}, entries_at
  for i = 1, #KEYS do
    local count = tonumber(ARGV[place])
    if told[i] and count > 0 then
      places[#places + 1] = place + 1
      places[#places + 1] = place + count
    end
    place = place + count + 1
  end
  append_entries(stream, numbers, writer, maxlen, places)
end
if not well then return failed end
return answer
