// Reads a disk over NBD as Xen Orchestra does for a backup: it asks the API where, opens several connections, and
// compares each block with what it should be. With `tls` it connects to another server of the same disks.
import { createHash } from 'node:crypto'
import MultiNbdClient from '@vates/nbd-client/multi.mjs'
import { run } from './client.mjs'

await run(async (xapi, { vdi, tls, purpose }) => {
  let infos = await xapi.call('VDI.get_nbd_info', vdi)
  const told = infos.map(({ exportname, ...info }) => info)
  const secret = infos.every(({ exportname }) => exportname.endsWith(`?session_id=${xapi.sessionId}`))
  if (tls !== undefined) {
    infos = infos.map(info => ({ ...info, ...tls }))
  }

  // As Xen Orchestra restricts backups to one network, and describes what it finds.
  const networks = Object.values(xapi.objects.all).filter(({ $type }) => $type === 'network')
  const [network] = networks
  const pifs = await Promise.all(network.PIFs.map(ref => xapi.getRecord('PIF', ref)))

  const client = new MultiNbdClient(infos, { nbdConcurrency: 4 })
  await client.connect()
  const hash = createHash('sha256')
  const size = 2 * 1024 * 1024
  const blocks = Math.ceil(Number(client.exportSize) / size)
  const indexes = function* () {
    for (let index = 0; index < blocks; index++) {
      yield { index, size }
    }
  }
  for await (const block of client.readBlocks(indexes)) {
    hash.update(block)
  }
  const map = tls === undefined ? await client.getMap() : undefined
  await client.disconnect()

  // Switched off and on again, which the objects cache of xen-api sees.
  await xapi.call('network.remove_purpose', network.$ref, purpose)
  const off = [(await xapi.barrier(network.$ref)).purpose, await xapi.call('VDI.get_nbd_info', vdi)]
  await xapi.call('network.add_purpose', network.$ref, purpose)
  const on = (await xapi.barrier(network.$ref)).purpose

  return {
    told,
    secret,
    networks: networks.length,
    purpose: network.purpose,
    addresses: pifs.map(({ IP }) => IP),
    attached: pifs.map(({ currently_attached }) => currently_attached),
    hosts: pifs.map(({ host }) => xapi.getObject(host).name_label),
    size: String(client.exportSize ?? ''),
    content: hash.digest('hex'),
    map,
    off,
    on,
  }
})
