// getResource: a whole download into a file, or one that is dropped on purpose after its beginning.
import { createWriteStream } from 'node:fs'
import { pipeline } from 'node:stream/promises'
import { describe, run } from './client.mjs'

await run(async (xapi, { file, vdi, drop }) => {
  const { body, headers, statusCode, task } = await xapi.getResource('/export_raw_vdi/', {
    query: { format: 'raw', vdi },
  })
  const ended = task.then(
    result => ({ result }),
    error => ({ error: describe(error) })
  )
  if (drop) {
    let read = 0
    for await (const piece of body) {
      read += piece.length
      if (read >= 512) {
        break // destroys the stream, and with it the connection
      }
    }
    return { statusCode, read }
  }
  await pipeline(body, createWriteStream(file))
  return { statusCode, length: headers['content-length'], type: headers['content-type'], task: await ended }
})
