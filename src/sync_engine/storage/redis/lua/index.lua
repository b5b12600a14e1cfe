-- Make the indexes right for what other programs, or versions before the indexes, wrote. ARGV[3] says which part:
--   'add'     KEYS: items' keys; put those that are items where they belong
--   'check'   KEYS[1]: an index; ARGV[4]: the entry to go on behind, ARGV[5]: how many; drop what is not so
--   'set'     KEYS[1]: a state's set; ARGV[4]: a cursor, ARGV[5]: about how many; drop what is not in that state
--   'ends'    KEYS[1]: the index of deadlines; the same; drop those that nobody has
--   'done'    from now on nobody needs to look, unless an index was lost meanwhile
-- Answer: how many entries were changed, and for the middle ones where to go on: '' or '0' at the end.

local refusal = layout_refusal()
if refusal then return redis.error_reply(refusal) end
local whole = is_whole()
local part = ARGV[3]

local HEADER_ID_END = 4 + 3 + 255 * 4
local TEXT_ID_END = #TEXT_HEAD + 255 * 12 + 1 -- each character may be two escapes

if part == 'done' then
  note_indexes(call('ZCARD', ids_index) == call('ZCARD', state_index))
  return { 0, '' }
end

-- The JSON string that begins at that byte of a text.
local function quoted_at(text, start)
  local from = start + 1
  while true do
    local stop = find(text, '()["\\]', from)
    if not stop then return end
    if string.sub(text, stop, stop) == '"' then
      local valid, told = pcall(cjson.decode, '[' .. string.sub(text, start, stop) .. ']')
      return valid and told[1]
    end
    from = stop + 2
  end
end

-- Which item a value says that it is; nil where it does not say. Another one's is there where the prefix of another
-- store begins with ours.
local function told_id(form, key)
  if form == DOCUMENT then
    return cjson.decode(call('JSON.GET', key, '$.id'))[1]
  elseif form == BINARY then
    local start = 30 + tonumber(call('GETRANGE', key, 22, 24)) -- of the header, a map whose first key is `id`
    local header = call('GETRANGE', key, start, start + HEADER_ID_END)
    if string.sub(header, 2, 4) ~= '\162id' then return end
    local valid, _, id = pcall(cmsgpack.unpack_one, header, 4)
    return valid and id or nil
  elseif form == TEXT then
    return quoted_at(call('GETRANGE', key, 0, TEXT_ID_END), #TEXT_HEAD)
  end
  local told = cjson.decode(call('GET', key))
  return told.object_id or told[1]
end

if part == 'add' then
  local forms, _, states = heads(KEYS)
  local sets, by_state, by_id, ends = {}, {}, {}, {}
  for i, key in ipairs(KEYS) do
    if states[i] and is_set(states[i]) then
      local id = id_of(key)
      if (told_id(forms[i], key) or id) == id then
        local member = member_of(states[i], id)
        push(sets, states[i], id)
        by_state[#by_state + 1], by_state[#by_state + 2] = '0', member
        by_id[#by_id + 1], by_id[#by_id + 2] = '0', id
        local deadline = call('PEXPIRETIME', key)
        if deadline > 0 then ends[#ends + 1], ends[#ends + 2] = deadline, member end
      end
    end
  end
  local changed = each_page('ZADD', ids_index, by_id) + each_page('ZADD', state_index, by_state)
  for state, ids in pairs(sets) do changed = changed + each_page('SADD', set_of(state), ids) end
  each_page('ZADD', expiring, ends)
  note_indexes(whole)
  return { changed, '' }
end

if part == 'check' then
  local from = ARGV[4] == '' and '-' or '(' .. ARGV[4]
  local members = call('ZRANGE', KEYS[1], from, '+', 'BYLEX', 'LIMIT', 0, ARGV[5])
  if #members == 0 then return { 0, '' } end
  local named = KEYS[1] == state_index
  local keys, state_of, stale, gone, leaving = {}, {}, {}, {}, {}
  for i, member in ipairs(members) do
    local state, id
    if named then state, id = find(member, '^(%Z*)%z(.*)$') end
    state_of[i] = state
    keys[i] = prefix .. (id or member)
  end
  local _, _, states = heads(keys)
  for i, member in ipairs(members) do
    if not states[i] or (named and states[i] ~= state_of[i]) then
      local id = id_of(keys[i])
      stale[#stale + 1] = member
      if not states[i] then gone[#gone + 1] = id end
      if state_of[i] and is_set(state_of[i]) then push(leaving, state_of[i], id) end
    end
  end
  local changed = each_page('ZREM', ids_index, gone)
  if named then changed = changed + each_page('ZREM', state_index, stale) + each_page('ZREM', expiring, stale) end
  for state, ids in pairs(leaving) do changed = changed + each_page('SREM', set_of(state), ids) end
  note_indexes(whole)
  return { changed, #members == tonumber(ARGV[5]) and members[#members] or '' }
end

local stale = {}
if part == 'ends' then
  local following = call('ZSCAN', expiring, ARGV[4], 'COUNT', ARGV[5])
  for n = 1, #following[2], 2 do
    local member = following[2][n]
    local id = find(member, '^%Z*%z(.+)$')
    local timed = id and call('PEXPIRETIME', prefix .. id) > 0
    if not timed or not call('ZSCORE', state_index, member) then stale[#stale + 1] = member end
  end
  local changed = each_page('ZREM', expiring, stale)
  note_indexes(whole)
  return { changed, following[1] }
end

local state = string.sub(KEYS[1], #set_of('') + 1)
if not is_set(state) then return { 0, '0' } end
local following = call('SSCAN', KEYS[1], ARGV[4], 'COUNT', ARGV[5])
for _, id in ipairs(following[2]) do
  if not call('ZSCORE', state_index, member_of(state, id)) then stale[#stale + 1] = id end
end
return { each_page('SREM', KEYS[1], stale), following[1] }
