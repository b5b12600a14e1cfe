-- What this place knows of its past. ARGV[3]: a stamp that `newest` is to reach, '' for none. ARGV[4] and [5]: a run
-- and what it had in `since`, where that was made up for, else ''. Answer: run, newest, began, since ('' for none).

if not holds(mark, 'hash') then
  return redis.error_reply('ERR the key ' .. mark .. ' holds something that is not its mark')
end
local known = read_mark(now_ms())
local news = known.news
if ARGV[3] ~= '' and older(known.newest, ARGV[3]) then
  known.newest = ARGV[3]
  news[#news + 1], news[#news + 2] = 'newest', known.newest
end
local healed = known.since and (nothing_here() or (ARGV[4] == known.run and ARGV[5] == known.since))
if #news > 0 then call('HSET', mark, unpack(news)) end
if healed then
  call('HDEL', mark, 'since')
  known.since = false
end
return { known.run, known.newest, known.began, known.since or '' }
