-- What a place knows of its own past, in the hash `__local__:mark`; stamps as decimal text.
--   run     the server as it is now: a restart, a promotion or another server changes it
--   newest  the highest stamp applied here            writes  how many script calls applied something
--   began   `newest` as this run found it             since   what may be lost is newer; absent once that was made up for
-- Every script that applies something looks first: whoever comes first after a restart keeps `newest` from rising
-- unnoticed above what was lost.

local mark = own .. 'mark'

-- Its name as a leader: of a run of the server, and of the time for which it led others.
local function run_of_server()
  local told = try('INFO', 'replication')
  if type(told) ~= 'string' then return '' end -- the user may not ask: restarts go unnoticed here
  local _, at = string.find(told, 'master_replid:', 1, true)
  return at and string.sub(told, at + 1, at + 40) or ''
end

-- Without an index it cannot be told whether there are items, unless there is nothing at all.
local function nothing_here()
  if call('EXISTS', ids_index) == 1 then return false end
  return call('GET', indexed) == '' or try('DBSIZE') == 0
end

-- Reads only. `news`: what has to be written.
local function read_mark(now)
  local held = call('HMGET', mark, 'newest', 'writes', 'run', 'began', 'since')
  local known = { newest = held[1] or '0', writes = tonumber(held[2] or 0), news = {} }
  known.run, known.began, known.since = held[3], held[4] or '0', held[5]
  local run = run_of_server()
  if run == known.run then return known end
  known.run = run
  if nothing_here() then
    known.began, known.since = string.format('%.0f', now * 65536), false -- nothing is there to be old
  else
    known.began = known.newest
    if not known.since or older(known.newest, known.since) then known.since = known.newest end
  end
  known.news = { 'run', run, 'began', known.began }
  if known.since then
    known.news[5], known.news[6] = 'since', known.since
  end
  return known
end
