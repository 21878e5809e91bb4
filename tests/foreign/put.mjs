// putResource: a stream with or without its length, bytes at once, or a stream that stops until it is cancelled;
// what xen-api says of it, and what the task came to.
import { createReadStream, readFileSync, statSync } from 'node:fs'
import { Readable } from 'node:stream'
import { describe, run } from './client.mjs'

await run(async (xapi, { file, vdi, body, query }) => {
  let sent
  const stalls = body === 'stream that stalls'
  if (body === 'bytes') {
    sent = readFileSync(file)
  } else if (stalls) {
    sent = new Readable({ read() {} })
    sent.push(readFileSync(file))
    sent.length = 2 * statSync(file).size
  } else {
    sent = createReadStream(file)
    if (body === 'stream with length') {
      sent.length = statSync(file).size
    }
  }
  const task = await xapi.createTask('put.mjs')
  const watched = xapi.watchTask(task).then(
    result => ({ result }),
    error => ({ error: describe(error) })
  )
  if (stalls) {
    const cancelWhenItRuns = async () => {
      while ((await xapi.call('task.get_progress', task)) < 0.4) {
        await xapi.barrier()
      }
      await xapi.call('task.cancel', task)
    }
    cancelWhenItRuns().catch(error => sent.destroy(error))
  }
  let result
  try {
    result = { value: await xapi.putResource(sent, '/import_raw_vdi/', { query: { ...query, vdi }, task }) }
  } catch (error) {
    result = { error: describe(error) }
  }
  return { result, task: await watched, ref: task }
})
