// Runs one program of the tests with a connected client of xen-api, as Xen Orchestra has it.
//
// What the program works on comes as JSON on standard input, since a password doesn't belong on a command line.
// What it found goes to standard output as one line of JSON, with every warning that xen-api has printed: in a
// session that goes well it prints none.
import { readFileSync } from 'node:fs'
import { createClient } from 'xen-api'

const warnings = []
console.warn = (...words) => warnings.push(words.map(word => word?.message ?? String(word)).join(' '))

// As in Xen Orchestra: when a task fails while a body of unknown length is still being sent, xen-api holds a
// rejected promise for a while, which alone would end the process.
process.on('unhandledRejection', error => warnings.push(`unhandled: ${error.message}`))

export const describe = error => ({ message: error.message, code: error.code, params: error.params })

// The error that a promise is rejected with; a promise that is fulfilled is a failure of the test.
export const rejection = promise =>
  promise.then(
    value => Promise.reject(new Error(`fulfilled with ${JSON.stringify(value)}`)),
    error => describe(error)
  )

// Whether the gateway refuses the session; xen-api logs out without waiting for the answer.
const isLoggedOut = async (url, session) => {
  const body = JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'VDI.get_all', params: [session] })
  const answer = await fetch(new URL('/jsonrpc', url), { method: 'POST', body })
  return (await answer.json()).error?.message === 'SESSION_INVALID'
}

export const run = async program => {
  const asked = JSON.parse(readFileSync(0, 'utf8'))
  const xapi = createClient({
    url: asked.url,
    auth: { user: asked.user, password: asked.password },
    transport: asked.transport,
    callTimeout: 30e3,
    httpInactivityTimeout: 30e3,
    // How long xen-api rests between two looks at the events; its default makes each wait 0.2 s longer.
    debounce: 10,
  })
  let found
  let code = 0
  let session
  try {
    await xapi.connect()
    await xapi.objectsFetched
    session = xapi.sessionId
    found = await program(xapi, asked)
  } catch (error) {
    found = { failed: { ...describe(error), stack: error.stack, call: error.call } }
    code = 1
  }
  await xapi.disconnect()
  while (session !== undefined && !(await isLoggedOut(asked.url, session))) {
    await new Promise(resolve => setTimeout(resolve, 10))
  }
  process.stdout.write(JSON.stringify({ ...found, warnings }) + '\n', () => process.exit(code))
}
